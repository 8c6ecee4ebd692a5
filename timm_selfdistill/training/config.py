"""Everything a run can be told, under timm's names."""

import datetime
import difflib
import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.optim import list_optimizers
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """The metadata of a field.

    Attributes:
        help: what it is. Names of other settings stand in braces, which become flags on the command line.
        bounds: ">= 1", "> 0", or an interval such as "[0, 1)"; None is allowed where the default is None.
        integer: whether it counts something.
        choices: all that it may be.
        flags: short forms of its flag.
        otherwise: what it is where it is not given, if the default does not tell.
    """

    help: str
    bounds: str = ""
    integer: bool = False
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    otherwise: str = ""

    def text(self, as_flags: bool = False) -> str:
        """The help, with the names of other settings as they are in Python, or on the command line."""
        text = f"{self.help} (default: {self.otherwise})" if self.otherwise else self.help
        return re.sub(r"{(\w+)}", lambda name: f"--{name[1].replace('_', '-')}" if as_flags else name[1], text)


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass with a `Setting`; the default may be a class that makes it."""
    described = {"setting": Setting(help, **metadata)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=described)
    return field(default=default, metadata=described)


def described_fields(config: Any) -> list[tuple[Field, Setting]]:
    """Those of a dataclass that are settings."""
    return [(entry, entry.metadata["setting"]) for entry in fields(config) if "setting" in entry.metadata]


@cache
def _types(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def element_type(config: type, name: str) -> type:
    """The type of one value of a field: int of `int | None` and of `tuple[int, ...]`."""
    found = _types(config)[name]
    while get_args(found):
        found = next(part for part in get_args(found) if part not in (type(None), Ellipsis))
    return found


def takes_several(config: type, name: str) -> bool:
    """Whether a field is a tuple."""
    found = _types(config)[name]
    return any(getattr(part, "__origin__", None) is tuple for part in (found, *get_args(found)))


def check_setting(name: str, value: Any, described: Setting, optional: bool) -> Any:
    """A value as it is kept: a float that counts something becomes an int.

    Raises:
        ValueError: it is out of its bounds, or none of its choices.
    """
    if value is None and optional:
        return None
    if described.choices and value not in described.choices:
        raise ValueError(f"{name} must be one of {', '.join(described.choices)}, got {value!r}")
    if described.integer:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(f"{name} must be a whole number, got {value}")
        value = int(value) if isinstance(value, float) else value
    if described.bounds and described.integer and not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if described.bounds and not (is_number(value) and _inside(value, described.bounds)):
        raise ValueError(f"{name} must {_words(described)}, got {value!r}")
    return value


def _words(described: Setting) -> str:
    """For example "lie in [0, 1)", "be a number >= 0", "be at least 1"."""
    if described.bounds[0] in "[(":
        return f"lie in {described.bounds}"
    if described.integer and described.bounds != ">= 0":
        return f"be at least {described.bounds.removeprefix('>= ')}"
    return f"be a number {described.bounds}"


def _inside(value: float, bounds: str) -> bool:
    if bounds[0] in "[(":
        low, high = map(float, bounds[1:-1].split(","))
        above = value >= low if bounds[0] == "[" else value > low
        return above and (value <= high if bounds[-1] == "]" else value < high)
    sign, bound = bounds.split()
    return (value >= float(bound) if sign == ">=" else value > float(bound)) and value < float("inf")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def documented(config: type) -> type:
    """Put the help of a dataclass's settings into its docstring, under "Args:"."""
    lines = []
    for entry, described in described_fields(config):
        default = "" if entry.default is MISSING else f" Default: {entry.default!r}."
        text = f"{entry.name}: {described.text()}.{'' if described.otherwise else default}"
        lines += textwrap.wrap(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 12)
    config.__doc__ = (config.__doc__ or "").replace("    Args:\n", "    Args:\n" + "\n".join(lines) + "\n", 1)
    return config


SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none")
CYCLIC = ("cosine", "tanh", "poly")
"""Schedules that have cycles, and a cooldown after them."""


@documented
@dataclass
class TrainConfig:
    """Settings of a training run.

    Names and meaning are those of the flags of timm's `train.py`; durations are in epochs.

    Args:
        settings: anything else that config.yaml should record, e.g. the model's name, under names of its own.

    Paths, and scalars and arrays of numpy and torch, become what YAML has for them.

    Raises:
        ValueError: a value is out of its range, or `settings` hold a name of the above.
        TypeError: `settings` hold what YAML cannot tell.

    Examples:
        >>> from timm_selfdistill import TrainConfig
        >>> config = TrainConfig(output="runs/photos", epochs=30, opt="adamw", lr=1e-3, mixup=0.2)
        >>> config.warmup_epochs
        1.0
        >>> TrainConfig(epochs=0)
        Traceback (most recent call last):
        ...
        ValueError: epochs must be at least 1, got 0
    """

    output: str = setting("", "run directory", otherwise="a new one under output/train, named after the time")
    resume: str | None = setting(
        None,
        'checkpoint folder or run directory to resume from; "latest" is the newest complete checkpoint in {output},'
        ' "auto" likewise, or a new run if there is none',
    )
    no_resume_opt: bool = setting(False, "resume without the state of the optimizer")
    device: str | None = setting(
        None, "cpu, cuda, cuda:1, ...", otherwise="the GPU of the process, or the CPU if there is none"
    )
    seed: int = setting(42, "random seed", integer=True, bounds=">= 0")
    epochs: int = setting(
        6,
        "epochs of the schedule; {warmup_prefix}, {cooldown_epochs} and {lr_cycle_limit} make the run longer",
        integer=True,
        bounds=">= 1",
    )
    start_epoch: int = setting(
        0, "begin with this epoch, counted from 0; for weights that were trained elsewhere", integer=True, bounds=">= 0"
    )
    batch_size: int | str = setting(
        64,
        'images per process and forward pass; "auto" is the largest power of two that fits into the GPU\'s memory (the'
        " learning rate does not follow it)",
        flags=("-b",),
    )
    validation_batch_size: int | None = setting(
        None,
        "images per process in validation",
        integer=True,
        bounds=">= 1",
        flags=("-vb",),
        otherwise="the batch size",
    )
    steps_per_epoch: int | None = setting(
        None,
        "updates in an epoch of streamed images",
        integer=True,
        bounds=">= 1",
        otherwise="all images, where their number is known",
    )
    train_num_samples: int | None = setting(
        None, "number of rows of a stream that does not tell it", integer=True, bounds=">= 1"
    )
    epoch_repeats: float = setting(0.0, "how often an epoch reads a stream, at least once", bounds=">= 0")
    shuffle_buffer: int = setting(
        1000, "rows of a stream that each DataLoader worker shuffles together", integer=True, bounds=">= 1"
    )
    aug_repeats: float = setting(
        0.0,
        "repeated augmentation (arXiv:1901.09335): each image comes this many times in a row, augmented differently,"
        " and an epoch has as many fewer images; 0 is off",
        bounds=">= 0",
    )
    opt: str = setting("sgd", "any of timm's optimizers")
    opt_eps: float | None = setting(None, "epsilon of the optimizer", otherwise="its own")
    opt_betas: tuple[float, ...] | None = setting(None, "betas of the optimizer", otherwise="its own")
    opt_kwargs: dict[str, Any] = setting(dict, "further arguments of the optimizer")
    lr: float = setting(0.05, "highest learning rate", bounds=">= 0", otherwise="0.05, or by {lr_base}")
    lr_base: float | None = setting(
        None, "learning rate for {lr_base_size} images per update, from which that of the run follows"
    )
    lr_base_size: int = setting(256, "images per update that {lr_base} is for", integer=True, bounds=">= 1")
    lr_base_scale: str = setting(
        "",
        "how the learning rate grows with the number of images: linear, or with its square root, sqrt",
        choices=("", "linear", "sqrt"),
        otherwise="sqrt for Adam's and LAMB's kind, else linear",
    )
    momentum: float = setting(0.9, "momentum", bounds=">= 0")
    weight_decay: float = setting(5e-4, "weight decay", bounds=">= 0")
    layer_decay: float | None = setting(
        None,
        "factor of the learning rate from each group of layers to the one below it (arXiv:2106.08254)",
        bounds="(0, 1]",
    )
    layer_decay_min_scale: float = setting(0.0, "lower bound of the factors of {layer_decay}", bounds=">= 0")
    layer_decay_no_opt_scale: float | None = setting(
        None, "layers whose factor by {layer_decay} is below it are not trained"
    )
    head_lr_scale: float = setting(1.0, "factor of the learning rate of the exits' heads", bounds=">= 0")
    head_warmup_epochs: int = setting(
        0,
        "epochs at the beginning in which only the classifiers are trained, the deepest included",
        integer=True,
        bounds=">= 0",
    )
    unlabelled: bool = setting(
        False, "train without labels: the exits of a frozen backbone learn from the deepest alone"
    )
    cache_features: bool = setting(
        False,
        "run a frozen backbone once on each image and keep its features in files; needs images without augmentation",
    )
    sched: str = setting("cosine", "learning-rate schedule: " + ", ".join(SCHEDULES))
    sched_on_updates: bool = setting(True, "step the schedule at every update, otherwise at every epoch")
    warmup_epochs: float = setting(1.0, "epochs of warm-up", bounds=">= 0")
    warmup_prefix: bool = setting(False, "warm up before {epochs}, not within them")
    warmup_lr: float = setting(1e-5, "learning rate at the start of the warm-up", bounds=">= 0")
    min_lr: float = setting(0.0, "lowest learning rate", bounds=">= 0")
    cooldown_epochs: int = setting(
        0, "epochs at {min_lr} after {epochs}, for cosine, tanh and poly", integer=True, bounds=">= 0"
    )
    lr_noise: tuple[float, ...] | None = setting(
        None, "share of the run from which, or between which, the learning rate is noisy"
    )
    lr_noise_pct: float = setting(0.67, "largest noise, as a share of the learning rate", bounds=">= 0")
    lr_noise_std: float = setting(1.0, "standard deviation of the noise", bounds=">= 0")
    lr_cycle_mul: float = setting(1.0, "length of a cycle relative to the one before", bounds=">= 0")
    lr_cycle_decay: float = setting(0.5, "learning rate of a cycle relative to the one before", bounds=">= 0")
    lr_cycle_limit: int = setting(
        1, "number of cycles of cosine, tanh and poly, the first {epochs} long", integer=True, bounds=">= 0"
    )
    lr_k_decay: float = setting(1.0, "exponent of the time in cosine and poly (arXiv:2004.05909)", bounds=">= 0")
    lr_decay_fn: str | None = setting(None, "shape of the decay of wsd and rsqrt", otherwise="timm's")
    lr_stable_timescale: float | None = setting(None, "time scale of rsqrt in epochs", otherwise="the warm-up")
    decay_epochs: float | None = setting(
        None,
        "epochs between two steps of the step schedule, or of the decay of wsd and rsqrt, below 1 as a share",
        bounds="> 0",
        otherwise="30, or 0.2",
    )
    decay_milestones: tuple[int, ...] = setting((90, 180, 270), "epochs of the steps of the multistep schedule")
    decay_rate: float = setting(0.1, "factor of a step, or the power of poly", bounds=">= 0", flags=("--dr",))
    patience_epochs: int = setting(
        10, "epochs without a better {eval_metric} before plateau lowers the learning rate", integer=True, bounds=">= 0"
    )
    smoothing: float = setting(0.0, "label smoothing; the task gets soft labels (B, K)", bounds="[0, 1)")
    mixup: float = setting(0.0, "alpha of mixup, 0 is off", bounds=">= 0")
    cutmix: float = setting(0.0, "alpha of CutMix, 0 is off", bounds=">= 0")
    cutmix_minmax: tuple[float, ...] | None = setting(
        None, "smallest and largest share of each side that CutMix takes, instead of {cutmix}"
    )
    mixup_prob: float = setting(1.0, "probability of mixup or CutMix for a batch", bounds="[0, 1]")
    mixup_switch_prob: float = setting(0.5, "probability of CutMix where both are on", bounds="[0, 1]")
    mixup_mode: str = setting("batch", "mix per batch, pair or image", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = setting(
        0, "epoch from which mixup and CutMix are off, 0 is never", integer=True, bounds=">= 0"
    )
    model_ema: bool = setting(False, "keep, evaluate and save a moving average of the weights")
    model_ema_decay: float = setting(0.9998, "decay of the moving average", bounds="[0, 1]")
    model_ema_warmup: bool = setting(False, "a faster moving average at the beginning, for short runs")
    amp: bool = setting(False, "mixed precision; otherwise that of accelerate launch")
    amp_dtype: str = setting("float16", "dtype of mixed precision", choices=("float16", "bfloat16"))
    grad_accum_steps: int = setting(1, "forward passes per update", integer=True, bounds=">= 1")
    clip_grad: float | None = setting(None, "clip gradients at this value, see {clip_mode}", bounds="> 0")
    clip_mode: str = setting(
        "norm",
        "what {clip_grad} limits: the norm of all gradients, each value, or the ratio to the norm of the weights, agc"
        " (arXiv:2102.06171)",
        choices=("norm", "value", "agc"),
    )
    channels_last: bool = setting(False, "memory format of images and weights")
    torchcompile: bool | str = setting(False, "compile the model with torch.compile; a backend, or inductor")
    torchcompile_mode: str | None = setting(None, "mode of torch.compile, e.g. max-autotune")
    capture_exits: bool | str = setting(
        False,
        "GPU: run heads and loss as one CUDA graph, made by torch.compile; for networks and images so small that"
        " launching the heads takes longer than running them; a backend, or inductor",
    )
    workers: int = setting(2, "DataLoader workers per process", integer=True, bounds=">= 0", flags=("-j",))
    log_interval: int = setting(50, "log the losses every so many updates", integer=True, bounds=">= 1")
    checkpoint_interval: str = setting(
        "", "write a checkpoint every so many updates (500) or so often (90s, 10m, 1h), besides one an epoch"
    )
    checkpoint_hist: int = setting(3, "number of checkpoints to keep", integer=True, bounds=">= 1")
    val_interval: int = setting(
        1, "epochs between two validations, each with a checkpoint", integer=True, bounds=">= 1"
    )
    eval_metric: str = setting(
        "top1",
        "validation metric of the deepest exit that selects the best model (of a frozen backbone, the mean of the other"
        " exits)",
        choices=("top1", "top5", "loss"),
    )
    on_bad_sample: str = setting(
        "raise", "an image that cannot be read stops the run, or is replaced by another one", choices=("raise", "skip")
    )
    on_nan: str = setting(
        "raise", "a loss that is not finite stops the run, or its update is skipped", choices=("raise", "skip")
    )
    sync_bn: bool = setting(False, "synchronized batch norm (GPUs only)")
    dist_bn: str = setting(
        "reduce",
        "batch norm statistics at the end of an epoch: average those of all processes, or take the main one's",
        choices=("reduce", "broadcast"),
    )
    profile: int = setting(0, "number of updates to trace into profile/, 0 is none", integer=True, bounds=">= 0")
    report_to: tuple[str, ...] = setting((), "trackers of Accelerate, e.g. tensorboard wandb")
    wandb_project: str | None = setting(None, "project in Weights & Biases", otherwise="timm-selfdistill")
    wandb_tags: tuple[str, ...] = setting((), "tags in Weights & Biases")
    push_to_hub: bool = setting(False, "upload the best model at the end, in the background")
    hub_model_id: str | None = setting(
        None, "repository on the Hub, user/name or name", otherwise="the name of the run directory"
    )
    hub_private: bool = setting(False, "make the repository private")
    hub_license: str | None = setting(
        None, "license in the model card, e.g. mit", otherwise="that of the pretrained weights, else apache-2.0"
    )
    hub_strategy: str = setting(
        "end",
        "when to upload: at the end, every new best model, or the last one every epoch",
        choices=("end", "best", "epoch"),
    )
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for a value that cannot work, before anything is spent on it."""
        for entry in fields(self):
            setattr(self, entry.name, plain_value(getattr(self, entry.name), entry.name))
        self._check_settings()
        self.checkpoint_interval = str(self.checkpoint_interval or "")
        parse_interval(self.checkpoint_interval)
        for entry, described in described_fields(self):
            value = getattr(self, entry.name)
            if value is not None and takes_several(TrainConfig, entry.name):
                value = _as_tuple(value)
            setattr(self, entry.name, check_setting(entry.name, value, described, entry.default is None))
        self._check_lists()
        self._check_combinations()
        self._check_names()

    def _check_lists(self) -> None:
        if list(self.decay_milestones) != sorted(set(self.decay_milestones)):
            raise ValueError(f"decay_milestones must increase, got {self.decay_milestones}")
        if self.lr_noise is not None and (
            len(self.lr_noise) > 2
            or list(self.lr_noise) != sorted(self.lr_noise)
            or not all(0 <= share <= 1 for share in self.lr_noise)
        ):
            raise ValueError(f"lr_noise must be one share of the run, or two that increase, got {self.lr_noise}")
        if self.cutmix_minmax is not None and (
            len(self.cutmix_minmax) != 2 or not 0 <= self.cutmix_minmax[0] <= self.cutmix_minmax[1] <= 1
        ):
            raise ValueError(f"cutmix_minmax must be two shares, the least and the most, got {self.cutmix_minmax}")

    def _check_names(self) -> None:
        known = [str(name) for name in list_optimizers()]
        if self.opt.lower().removeprefix("lookahead_") not in known:
            close = difflib.get_close_matches(self.opt.lower(), known, 3)
            raise ValueError(
                f"unknown optimizer {self.opt!r}; "
                + (f"did you mean {', '.join(close)}?" if close else f"timm has {', '.join(known)}")
            )
        if self.sched not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.sched!r}; choose from {', '.join(SCHEDULES)}")
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id, "hub_model_id")

    def _check_combinations(self) -> None:
        """Settings that are right alone, but not together."""
        if self.head_warmup_epochs >= self.epochs and self.head_warmup_epochs:
            raise ValueError(
                f"head_warmup_epochs must be less than epochs ({self.epochs}), got {self.head_warmup_epochs}; to train"
                " the heads alone, freeze the backbone"
            )
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f'batch_size must be a number or "auto", got {self.batch_size!r}')
        if not isinstance(self.batch_size, str) and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.sched == "plateau" and self.warmup_prefix:
            raise ValueError("warmup_prefix is of schedules that know their end, and plateau does not; leave it out")
        if self.sched == "plateau" and self.start_epoch:
            raise ValueError("plateau goes by the metrics of all epochs, so that start_epoch must be 0")
        if self.lr_base is None and (self.lr_base_size != 256 or self.lr_base_scale):
            raise ValueError(
                "lr_base_size and lr_base_scale are of lr_base, which is not given; give it, or leave them out"
            )
        if self.cooldown_epochs and self.sched not in CYCLIC:
            raise ValueError(
                f"cooldown_epochs is of the schedules {', '.join(CYCLIC)}, and sched is {self.sched}; leave it out"
            )
        if self.no_resume_opt and self.resume is None:
            raise ValueError("no_resume_opt leaves a part of a checkpoint out, and none is resumed; give resume, too")
        if 0 < self.aug_repeats < 1:
            raise ValueError(f"aug_repeats must be 0 (off) or at least 1, got {self.aug_repeats}")
        if self.capture_exits and self.torchcompile:
            raise ValueError("torchcompile compiles heads and loss, too; leave capture_exits out")
        if self.torchcompile_mode and not self.torchcompile:
            raise ValueError(f"torchcompile_mode {self.torchcompile_mode} is of torchcompile, which is off")
        if (self.wandb_project or self.wandb_tags) and "wandb" not in self.report_to:
            raise ValueError(
                "wandb_project and wandb_tags are for the tracker wandb; add it to report_to (--log-wandb)"
            )
        if (self.mixup or self.cutmix or self.cutmix_minmax) and self.batch_size != "auto" and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix pair images: batch_size must be even, got {self.batch_size}")
        if self.unlabelled and self.smoothing:
            raise ValueError("smoothing is of labels, which unlabelled images do not have; leave one of them out")
        for name in ("mixup", "cutmix", "cutmix_minmax") if self.cache_features else ():
            if getattr(self, name):
                raise ValueError(
                    f"cache_features keeps what the backbone says of each image, and {name} (--{name})"
                    " changes them in every epoch; leave one of them out"
                )
        if self.cache_features and self.aug_repeats:
            raise ValueError(
                "cache_features keeps what the backbone says of each image, and aug_repeats augments each"
                " several times; leave one of them out"
            )
        if self.cache_features and self.on_bad_sample != "raise":
            raise ValueError("cache_features needs every image; on_bad_sample must be 'raise'")

    @property
    def mixed_precision(self) -> str | None:
        """Accelerate's name of the precision; None leaves it to `accelerate launch`."""
        return {"float16": "fp16", "bfloat16": "bf16"}[self.amp_dtype] if self.amp else None

    def to_dict(self) -> dict[str, Any]:
        """What config.yaml holds: every field and setting, flat, so that `train.py --config` reads it."""
        self._check_settings()  # which may have been added to
        values = plain_value(asdict(self), "config")
        settings = values.pop("settings")
        return {**values, **settings}

    def _check_settings(self) -> None:
        if taken := sorted({entry.name for entry in fields(self)} & self.settings.keys()):
            raise ValueError(
                f"settings must have names of their own, got {', '.join(taken)}, which TrainConfig has"
                f" itself: give TrainConfig({taken[0]}=...), or choose another name"
            )


def parse_interval(text: str) -> tuple[int, int]:
    """Updates and seconds between two checkpoints, of which one is 0.

    Args:
        text: "500" is every 500 updates; "90s", "10m", "1h" is time; "" is never.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(\d{1,9})([smh]?)", text)
    if not text:
        return 0, 0
    if match is None or int(match[1]) == 0:
        raise ValueError(f"checkpoint_interval must be updates or a time such as 500, 90s, 10m or 1h, got {text!r}")
    seconds = {"": 0, "s": 1, "m": 60, "h": 3600}[match[2]]
    return (0, int(match[1]) * seconds) if seconds else (int(match[1]), 0)


def plain_value(value: Any, name: str) -> Any:
    """A value as YAML's own types, all the way down: Python's numbers, text, lists and dicts.

    Args:
        name: for the error message.

    Raises:
        TypeError: there is none for it.
    """
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        value = value.tolist()
    elif isinstance(value, Enum):
        value = value.value
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        return {plain_value(key, name): plain_value(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain_value(entry, name) for entry in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None or isinstance(value, datetime.date):
        return value
    raise TypeError(
        f"{name} must be a number, text, path, list or dict, so that config.yaml can tell it, got"
        f" {type(value).__name__}; give its name or its values"
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Also of one value alone."""
    return tuple(value) if isinstance(value, list) else (value,)


def check_repo_id(repo_id: str, what: str) -> None:
    """Raise ValueError, which says what was given, for what cannot be the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{what} must be 'user/name' or 'name', got {repo_id!r}") from error
