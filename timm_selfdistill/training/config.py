"""Settings of a training run, under timm's names."""

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
        help: description. Names of other settings are written in braces and become flags on the command line.
        bounds: ">= 1", "> 0", or an interval such as "[0, 1)"; None is allowed if the default is None.
        integer: whether the value must be a whole number.
        choices: allowed values.
        flags: short forms of the flag.
        otherwise: what applies if the setting is not given, where the default does not show it.
    """

    help: str
    bounds: str = ""
    integer: bool = False
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    otherwise: str = ""

    def text(self, as_flags: bool = False) -> str:
        """Return the help text, with other settings named as in Python or as flags."""
        text = f"{self.help} (default: {self.otherwise})" if self.otherwise else self.help
        return re.sub(r"{(\w+)}", lambda name: f"--{name[1].replace('_', '-')}" if as_flags else name[1], text)


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field described by a `Setting`; a class as default is the field's default factory."""
    described = {"setting": Setting(help, **metadata)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=described)
    return field(default=default, metadata=described)


def described_fields(config: Any) -> list[tuple[Field, Setting]]:
    """Return the fields of a dataclass that are settings, each with its `Setting`."""
    return [(entry, entry.metadata["setting"]) for entry in fields(config) if "setting" in entry.metadata]


@cache
def _types(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def element_type(config: type, name: str) -> type:
    """Return the type of a single value of a field: int for `int | None` and for `tuple[int, ...]`."""
    found = _types(config)[name]
    while get_args(found):
        found = next(part for part in get_args(found) if part not in (type(None), Ellipsis))
    return found


def takes_several(config: type, name: str) -> bool:
    """Whether a field is a tuple."""
    found = _types(config)[name]
    return any(getattr(part, "__origin__", None) is tuple for part in (found, *get_args(found)))


def check_setting(name: str, value: Any, described: Setting, optional: bool) -> Any:
    """Return the value as it is stored: a whole number given as a float becomes an int.

    Raises:
        ValueError: the value is out of bounds or not among the choices.
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
    """Return the requirement in words, e.g. "lie in [0, 1)", "be a number >= 0", "be at least 1"."""
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
    """Insert the help of a dataclass's settings into its docstring, under "Args:"."""
    lines = []
    for entry, described in described_fields(config):
        default = "" if entry.default is MISSING else f" Default: {entry.default!r}."
        text = f"{entry.name}: {described.text()}.{'' if described.otherwise else default}"
        lines += textwrap.wrap(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 12)
    config.__doc__ = (config.__doc__ or "").replace("    Args:\n", "    Args:\n" + "\n".join(lines) + "\n", 1)
    return config


SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none")
CYCLIC = ("cosine", "tanh", "poly")
"""Schedules with cycles, which can end in a cooldown."""


@documented
@dataclass
class TrainConfig:
    """Settings of a training run.

    The names and meanings are those of the flags of timm's `train.py`; durations are in epochs.

    Args:
        settings: anything else that config.yaml should record, e.g. the model's name; no key may be one of the names
            above.

    Paths and NumPy or torch scalars and arrays are converted to plain YAML types.

    Raises:
        ValueError: a value is out of range, or `settings` uses one of the names above.
        TypeError: `settings` holds a value that YAML cannot represent.

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

    output: str = setting("", "run directory", otherwise="a new one under output/train, named by date and time")
    resume: str | None = setting(
        None,
        'checkpoint folder or run directory to resume from; "latest" is the newest complete checkpoint in {output};'
        ' "auto" is the same, or a new run if there is none',
    )
    no_resume_opt: bool = setting(False, "resume without the state of the optimizer")
    device: str | None = setting(
        None, "cpu, cuda, cuda:1, ...", otherwise="the process's GPU, or the CPU if there is none"
    )
    seed: int = setting(42, "random seed", integer=True, bounds=">= 0")
    epochs: int = setting(
        6,
        "number of epochs; {warmup_prefix}, {cooldown_epochs} and {lr_cycle_limit} make the run longer",
        integer=True,
        bounds=">= 1",
    )
    start_epoch: int = setting(
        0, "epoch to start at, counted from 0; for weights that were trained elsewhere", integer=True, bounds=">= 0"
    )
    batch_size: int | str = setting(
        64,
        'images per process and forward pass; "auto" is the largest power of two that fits in GPU memory ({lr} is not'
        " scaled with it)",
        flags=("-b",),
    )
    validation_batch_size: int | None = setting(
        None,
        "images per process and forward pass in validation",
        integer=True,
        bounds=">= 1",
        flags=("-vb",),
        otherwise="the batch size",
    )
    steps_per_epoch: int | None = setting(
        None,
        "updates per epoch when streaming",
        integer=True,
        bounds=">= 1",
        otherwise="one pass over all images, if their number is known",
    )
    train_num_samples: int | None = setting(
        None, "number of images in a stream of unknown length", integer=True, bounds=">= 1"
    )
    epoch_repeats: float = setting(0.0, "passes over a stream per epoch; values below 1 count as one", bounds=">= 0")
    shuffle_buffer: int = setting(
        1000, "rows that each DataLoader worker shuffles at a time when streaming", integer=True, bounds=">= 1"
    )
    aug_repeats: float = setting(
        0.0,
        "repeated augmentation (arXiv:1901.09335): each image is repeated this many times with different augmentation,"
        " and an epoch has fewer distinct images in proportion; 0 is off",
        bounds=">= 0",
    )
    opt: str = setting("sgd", "optimizer, any of timm's")
    opt_eps: float | None = setting(None, "optimizer epsilon", otherwise="the optimizer's own")
    opt_betas: tuple[float, ...] | None = setting(None, "optimizer betas", otherwise="the optimizer's own")
    opt_kwargs: dict[str, Any] = setting(dict, "further optimizer arguments")
    lr: float = setting(0.05, "peak learning rate", bounds=">= 0", otherwise="0.05, or computed from {lr_base}")
    lr_base: float | None = setting(
        None, "learning rate for {lr_base_size} images per update; the run's learning rate is scaled from it"
    )
    lr_base_size: int = setting(256, "images per update that {lr_base} refers to", integer=True, bounds=">= 1")
    lr_base_scale: str = setting(
        "",
        "how {lr_base} is scaled with the number of images per update: linearly or by its square root",
        choices=("", "linear", "sqrt"),
        otherwise="sqrt for Adam-like optimizers and LAMB, else linear",
    )
    momentum: float = setting(0.9, "momentum", bounds=">= 0")
    weight_decay: float = setting(5e-4, "weight decay", bounds=">= 0")
    layer_decay: float | None = setting(
        None,
        "layer-wise learning rate decay: factor from each group of layers to the one below (arXiv:2106.08254)",
        bounds="(0, 1]",
    )
    layer_decay_min_scale: float = setting(0.0, "lower bound of the {layer_decay} factors", bounds=">= 0")
    layer_decay_no_opt_scale: float | None = setting(
        None, "layers whose {layer_decay} factor is below this are not trained"
    )
    head_lr_scale: float = setting(1.0, "learning rate factor for the heads of the exits", bounds=">= 0")
    head_warmup_epochs: int = setting(
        0,
        "epochs at the start in which only the heads and the deepest exit's classifier are trained",
        integer=True,
        bounds=">= 0",
    )
    unlabelled: bool = setting(
        False, "train without labels: the exits of a frozen backbone learn only from the deepest exit"
    )
    cache_features: bool = setting(
        False,
        "run a frozen backbone once per image and cache its features on disk; requires images without augmentation",
    )
    sched: str = setting("cosine", "learning rate schedule: " + ", ".join(SCHEDULES))
    sched_on_updates: bool = setting(True, "step the schedule after every update instead of every epoch")
    warmup_epochs: float = setting(1.0, "warmup epochs", bounds=">= 0")
    warmup_prefix: bool = setting(False, "add the warmup to {epochs} instead of counting it as part of them")
    warmup_lr: float = setting(1e-5, "learning rate at the start of the warmup", bounds=">= 0")
    min_lr: float = setting(0.0, "lowest learning rate", bounds=">= 0")
    cooldown_epochs: int = setting(
        0, "epochs at {min_lr} after {epochs}, for cosine, tanh and poly", integer=True, bounds=">= 0"
    )
    lr_noise: tuple[float, ...] | None = setting(
        None, "add noise to the learning rate from this fraction of the run on, or between two fractions"
    )
    lr_noise_pct: float = setting(0.67, "limit of the noise, as a fraction of the learning rate", bounds=">= 0")
    lr_noise_std: float = setting(1.0, "standard deviation of the noise", bounds=">= 0")
    lr_cycle_mul: float = setting(1.0, "factor of the cycle length from one cycle to the next", bounds=">= 0")
    lr_cycle_decay: float = setting(0.5, "factor of the learning rate from one cycle to the next", bounds=">= 0")
    lr_cycle_limit: int = setting(
        1, "number of cycles for cosine, tanh and poly; the first is {epochs} long", integer=True, bounds=">= 0"
    )
    lr_k_decay: float = setting(1.0, "k-decay exponent for cosine and poly (arXiv:2004.05909)", bounds=">= 0")
    lr_decay_fn: str | None = setting(None, "shape of the decay for wsd and rsqrt", otherwise="timm's")
    lr_stable_timescale: float | None = setting(None, "time scale of rsqrt in epochs", otherwise="the warmup")
    decay_epochs: float | None = setting(
        None,
        "epochs between steps of the step schedule; for wsd and rsqrt, length of the decay, as a fraction if below 1",
        bounds="> 0",
        otherwise="30, or 0.2",
    )
    decay_milestones: tuple[int, ...] = setting((90, 180, 270), "epochs at which the multistep schedule steps")
    decay_rate: float = setting(0.1, "factor of each step; for poly, the power", bounds=">= 0", flags=("--dr",))
    patience_epochs: int = setting(
        10, "epochs without a better {eval_metric} before plateau lowers the learning rate", integer=True, bounds=">= 0"
    )
    smoothing: float = setting(0.0, "label smoothing; the task receives soft labels (B, K)", bounds="[0, 1)")
    mixup: float = setting(0.0, "mixup alpha, 0 is off", bounds=">= 0")
    cutmix: float = setting(0.0, "CutMix alpha, 0 is off", bounds=">= 0")
    cutmix_minmax: tuple[float, ...] | None = setting(
        None, "minimum and maximum of the CutMix box, as fractions of the image's side; replaces {cutmix}"
    )
    mixup_prob: float = setting(1.0, "probability of applying mixup or CutMix to a batch", bounds="[0, 1]")
    mixup_switch_prob: float = setting(0.5, "probability of choosing CutMix when both are on", bounds="[0, 1]")
    mixup_mode: str = setting("batch", "mix per batch, pair or image", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = setting(
        0, "turn mixup and CutMix off from this epoch on, 0 is never", integer=True, bounds=">= 0"
    )
    model_ema: bool = setting(False, "track a moving average of the weights, which is evaluated and saved")
    model_ema_decay: float = setting(0.9998, "decay of the moving average", bounds="[0, 1]")
    model_ema_warmup: bool = setting(False, "lower decay of the moving average at first, for short runs")
    amp: bool = setting(False, "mixed precision; if off, the setting of accelerate launch applies")
    amp_dtype: str = setting("float16", "dtype for mixed precision", choices=("float16", "bfloat16"))
    grad_accum_steps: int = setting(1, "forward passes per update", integer=True, bounds=">= 1")
    clip_grad: float | None = setting(None, "clip gradients at this value, see {clip_mode}", bounds="> 0")
    clip_mode: str = setting(
        "norm",
        "what {clip_grad} limits: the norm of all gradients, each value, or (agc) the ratio of gradient norm to weight"
        " norm (arXiv:2102.06171)",
        choices=("norm", "value", "agc"),
    )
    channels_last: bool = setting(False, "channels_last memory format for images and weights")
    torchcompile: bool | str = setting(False, "compile the model with torch.compile; inductor or another backend")
    torchcompile_mode: str | None = setting(None, "torch.compile mode, e.g. max-autotune")
    capture_exits: bool | str = setting(
        False,
        "run heads and loss as one CUDA graph, made by torch.compile; for networks and images so small that launching"
        " the heads takes longer than running them; inductor or another backend",
    )
    workers: int = setting(2, "DataLoader workers per process", integer=True, bounds=">= 0", flags=("-j",))
    log_interval: int = setting(50, "log the loss every N updates", integer=True, bounds=">= 1")
    checkpoint_interval: str = setting(
        "", "interval of checkpoints within an epoch, in updates (500) or time (90s, 10m, 1h); each epoch ends with one"
    )
    checkpoint_hist: int = setting(3, "number of checkpoints to keep", integer=True, bounds=">= 1")
    val_interval: int = setting(
        1, "epochs between validations, each followed by a checkpoint", integer=True, bounds=">= 1"
    )
    eval_metric: str = setting(
        "top1",
        "validation metric of the deepest exit that selects the best model (with a frozen backbone, the average over"
        " the other exits)",
        choices=("top1", "top5", "loss"),
    )
    on_bad_sample: str = setting(
        "raise", "stop at an image that cannot be read, or replace it with another one", choices=("raise", "skip")
    )
    on_nan: str = setting("raise", "stop when the loss is not finite, or skip the update", choices=("raise", "skip"))
    sync_bn: bool = setting(False, "synchronized batch norm (GPUs only)")
    dist_bn: str = setting(
        "reduce",
        "batch norm statistics at the end of an epoch: average over all processes, or broadcast from the main process",
        choices=("reduce", "broadcast"),
    )
    profile: int = setting(0, "number of updates to trace into profile/, 0 is off", integer=True, bounds=">= 0")
    report_to: tuple[str, ...] = setting((), "trackers of Accelerate, e.g. tensorboard wandb")
    wandb_project: str | None = setting(None, "Weights & Biases project", otherwise="timm-selfdistill")
    wandb_tags: tuple[str, ...] = setting((), "Weights & Biases tags")
    push_to_hub: bool = setting(False, "upload the best model at the end, in the background")
    hub_model_id: str | None = setting(
        None, "repository on the Hub, user/name or name", otherwise="the name of the run directory"
    )
    hub_private: bool = setting(False, "create a private repository")
    hub_license: str | None = setting(
        None, "license for the model card, e.g. mit", otherwise="that of the pretrained weights, else apache-2.0"
    )
    hub_strategy: str = setting(
        "end",
        "what to upload when: the best model at the end, every new best model, or the last model of every epoch",
        choices=("end", "best", "epoch"),
    )
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for a value that cannot work, before the run spends any time."""
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
            raise ValueError(
                f"lr_noise must be one fraction of the run, or two in ascending order, got {self.lr_noise}"
            )
        if self.cutmix_minmax is not None and (
            len(self.cutmix_minmax) != 2 or not 0 <= self.cutmix_minmax[0] <= self.cutmix_minmax[1] <= 1
        ):
            raise ValueError(f"cutmix_minmax must be two fractions, minimum and maximum, got {self.cutmix_minmax}")

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
        """Raise ValueError for settings that are each valid, but not together."""
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
            raise ValueError("warmup_prefix needs a schedule of known length, which plateau is not; leave it out")
        if self.sched == "plateau" and self.start_epoch:
            raise ValueError("start_epoch must be 0 with plateau, which needs the metrics of all previous epochs")
        if self.lr_base is None and (self.lr_base_size != 256 or self.lr_base_scale):
            raise ValueError("lr_base_size and lr_base_scale have no effect without lr_base; set it, or leave them out")
        if self.cooldown_epochs and self.sched not in CYCLIC:
            raise ValueError(
                f"cooldown_epochs works with the schedules {', '.join(CYCLIC)}, but sched is {self.sched}; leave it out"
            )
        if self.no_resume_opt and self.resume is None:
            raise ValueError("no_resume_opt has no effect without resume; set resume, too")
        if 0 < self.aug_repeats < 1:
            raise ValueError(f"aug_repeats must be 0 (off) or at least 1, got {self.aug_repeats}")
        if self.capture_exits and self.torchcompile:
            raise ValueError("torchcompile already compiles heads and loss; leave capture_exits out")
        if self.torchcompile_mode and not self.torchcompile:
            raise ValueError(f"torchcompile_mode {self.torchcompile_mode} has no effect without torchcompile")
        if (self.wandb_project or self.wandb_tags) and "wandb" not in self.report_to:
            raise ValueError("wandb_project and wandb_tags need the tracker wandb; add it to report_to (--log-wandb)")
        if (self.mixup or self.cutmix or self.cutmix_minmax) and self.batch_size != "auto" and self.batch_size % 2:
            raise ValueError(f"batch_size must be even with mixup or cutmix, which pair images, got {self.batch_size}")
        if self.unlabelled and self.smoothing:
            raise ValueError("smoothing applies to labels, and unlabelled trains without any; leave one of them out")
        for name in ("mixup", "cutmix", "cutmix_minmax") if self.cache_features else ():
            if getattr(self, name):
                raise ValueError(
                    f"cache_features stores the features of each image once, but {name} (--{name}) changes the images"
                    " in every epoch; leave one of them out"
                )
        if self.cache_features and self.aug_repeats:
            raise ValueError(
                "cache_features stores the features of each image once, but aug_repeats augments each image several"
                " times; leave one of them out"
            )
        if self.cache_features and self.on_bad_sample != "raise":
            raise ValueError("on_bad_sample must be 'raise' with cache_features, which needs every image")

    @property
    def mixed_precision(self) -> str | None:
        """Accelerate's name for the precision; None leaves it to `accelerate launch`."""
        return {"float16": "fp16", "bfloat16": "bf16"}[self.amp_dtype] if self.amp else None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and settings as one flat dict, the content of config.yaml, which `--config` reads."""
        self._check_settings()  # keys may have been added since
        values = plain_value(asdict(self), "config")
        settings = values.pop("settings")
        return {**values, **settings}

    def _check_settings(self) -> None:
        if taken := sorted({entry.name for entry in fields(self)} & self.settings.keys()):
            raise ValueError(
                f"settings must not use names of TrainConfig's own fields, got {', '.join(taken)}; pass"
                f" TrainConfig({taken[0]}=...), or choose another name"
            )


def parse_interval(text: str) -> tuple[int, int]:
    """Return the updates and the seconds between two checkpoints; at least one of them is 0.

    Args:
        text: "500" for every 500 updates; "90s", "10m" or "1h" for a time; "" for never.

    Raises:
        ValueError: the text is none of these.
    """
    match = re.fullmatch(r"(\d{1,9})([smh]?)", text)
    if not text:
        return 0, 0
    if match is None or int(match[1]) == 0:
        raise ValueError(f"checkpoint_interval must be updates (500) or a time (90s, 10m, 1h), got {text!r}")
    seconds = {"": 0, "s": 1, "m": 60, "h": 3600}[match[2]]
    return (0, int(match[1]) * seconds) if seconds else (int(match[1]), 0)


def plain_value(value: Any, name: str) -> Any:
    """Convert a value, recursively, to types that YAML can represent: numbers, strings, lists and dicts.

    Args:
        name: of the value, for the error message.

    Raises:
        TypeError: a value has no such type.
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
        f"{name} must be a number, string, path, list or dict, which config.yaml can hold, got"
        f" {type(value).__name__}; pass its name or its values instead"
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a tuple of a list or of a single value."""
    return tuple(value) if isinstance(value, list) else (value,)


def check_repo_id(repo_id: str, what: str) -> None:
    """Raise ValueError for a string that cannot be the id of a Hub repository.

    Args:
        what: name of the setting, for the message.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{what} must be 'user/name' or 'name', got {repo_id!r}") from error
