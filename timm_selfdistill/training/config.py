"""Everything a run can be told, under timm's names."""

import datetime
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.optim import list_optimizers
from torch import Tensor

CHOICES = {
    "mixup_mode": ("batch", "pair", "elem"),
    "amp_dtype": ("float16", "bfloat16"),
    "clip_mode": ("norm", "value", "agc"),
    "eval_metric": ("top1", "top5", "loss"),
    "lr_base_scale": ("", "linear", "sqrt"),
    "on_bad_sample": ("raise", "skip"),
    "on_nan": ("raise", "skip"),
    "dist_bn": ("reduce", "broadcast"),
    "hub_strategy": ("end", "best", "epoch"),
}
WHOLE = (
    "seed",
    "epochs",
    "batch_size",
    "validation_batch_size",
    "steps_per_epoch",
    "shuffle_buffer",
    "head_warmup_epochs",
    "mixup_off_epoch",
    "grad_accum_steps",
    "workers",
    "log_interval",
    "checkpoint_hist",
    "lr_cycle_limit",
    "lr_base_size",
    "cooldown_epochs",
    "patience_epochs",
    "val_interval",
    "start_epoch",
    "train_num_samples",
)
"""Fields that count something."""
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none")
CYCLIC = ("cosine", "tanh", "poly")
"""Schedules that have cycles, and a cooldown after them."""


@dataclass
class TrainConfig:
    """Settings of a training run.

    Names and meaning are those of the flags of timm's `train.py`; durations are in epochs.

    Args:
        output: run directory; "" makes one under output/train, named after the time.
        resume: checkpoint folder or run directory to go on from; "latest" is the newest whole checkpoint in `output`,
            "auto" likewise, and a new run where there is none. no_resume_opt: without the optimizer's state.
        device: "cpu", "cuda", "cuda:1", ...; None is the GPU of the process, and the CPU where there is none.
        epochs: of the schedule; the run is longer where warmup_prefix, cooldown_epochs or lr_cycle_limit say so.
        start_epoch: begin with the schedule and the images of this epoch, from 0; for weights that were trained
            elsewhere.
        batch_size: images per process and forward pass; "auto" is the largest power of two that the GPU's memory
            holds, or that of the checkpoint that is resumed. The learning rate does not follow it.
        validation_batch_size: None is `batch_size`.
        steps_per_epoch: updates of an epoch of streamed images; None is all of them, where their number is known.
        train_num_samples: rows of a stream that does not tell their number. epoch_repeats: how often an epoch reads
            them; at least once.
        shuffle_buffer: rows of a stream that each loading process shuffles together.
        aug_repeats: repeated augmentation (arXiv:1901.09335): each image comes so many times in a row, each time
            augmented in another way, and an epoch is of as many fewer images; 0 is off.
        opt: name of one of timm's optimizers. opt_eps, opt_betas: its epsilon and betas; None are its own. opt_kwargs:
            any other of its arguments.
        lr: highest learning rate. lr_base, where it is given, takes its place: the learning rate of lr_base_size images
            an update, which by lr_base_scale grows with their number ("linear"), or with its root ("sqrt"); "" is
            "sqrt" for optimizers of the kind of Adam and LAMB, else "linear".
        layer_decay: factor of the learning rate from each group of layers to the one below it (arXiv:2106.08254); None
            is 1 for all. layer_decay_min_scale: the least that it comes to. layer_decay_no_opt_scale: layers for which
            it comes to less are not trained; None is all are.
        head_lr_scale: factor of the learning rate of the shallow classifiers.
        head_warmup_epochs: epochs at the beginning in which all classifiers learn alone, the deepest included, while
            the backbone's features stay as they are.
        unlabelled: the training images have no labels, or these are not used: the exits of a frozen backbone learn from
            the deepest classifier alone.
        cache_features: let a frozen backbone see each image once and keep what it gives, in files in the run directory
            while the run goes on. Images must not be augmented.
        sched: learning-rate schedule, stepped every update, or without sched_on_updates every epoch, as "plateau"
            always is. warmup_epochs: of the warm-up from warmup_lr, with warmup_prefix before the `epochs`.
            cooldown_epochs: at min_lr, after the `epochs` of "cosine", "tanh" and "poly". decay_epochs: of a step of
            "step" (None is 30), or the length of the decay of "wsd" and "rsqrt", below 1 as a share (None is 0.2).
            decay_milestones: epochs of the steps of "multistep". decay_rate: factor of a step, or the power of "poly".
            patience_epochs: of "plateau", without a better eval_metric before a step. lr_cycle_limit: cycles of
            "cosine", "tanh" and "poly", of which each is lr_cycle_mul times as long as the one before, the first
            `epochs` long, and begins at lr_cycle_decay of its learning rate. lr_k_decay: exponent of the time in
            "cosine" and "poly" (arXiv:2004.05909). lr_decay_fn, lr_stable_timescale: shape of the decay of "wsd" and
            "rsqrt", and the epochs that scale the latter. lr_noise: share of the run from which, or between which,
            noise is multiplied to the learning rate, of the standard deviation lr_noise_std, below lr_noise_pct.
        smoothing: label smoothing; the task sees soft labels (B, K) then, and with mixup or cutmix.
        mixup, cutmix: their alpha; 0 is off. cutmix_minmax: the least and the most of each side that cutmix takes,
            instead of its alpha. mixup_off_epoch: epoch from which both are off; 0 is never.
        model_ema: keep an average of the weights; it is what is evaluated and saved. model_ema_warmup: a faster
            average at the beginning, for short runs.
        amp: mixed precision, in amp_dtype "float16" or "bfloat16"; False leaves it to `accelerate launch`.
        torchcompile: compile the model with torch.compile; True with the backend "inductor", or the name of another.
            torchcompile_mode: its mode, e.g. "max-autotune".
        grad_accum_steps: forward passes per update.
        clip_grad: None is off; by clip_mode "norm" the highest norm of all gradients, "value" the highest value, "agc"
            the highest ratio of the norms of gradient and weights, of each unit (arXiv:2102.06171).
        workers: data-loading processes per training process.
        log_interval: updates between two looks at the loss.
        checkpoint_interval: besides the end of every epoch, a checkpoint every so many updates ("500") or so often
            ("90s", "10m", "1h"); "" is at the end of an epoch only.
        checkpoint_hist: checkpoints kept.
        val_interval: epochs between two validations; model and checkpoint of the epoch are saved after each.
        eval_metric: by which one model is better than another: "top1", "top5" or "loss" of the deepest exit on the
            validation images, where it is frozen the mean of the others.
        on_bad_sample: "raise", or "skip": a training image that cannot be read gives its place to another; counted.
        on_nan: "raise" at a loss that is not finite, or "skip" an update whose gradients are not; counted.
        sync_bn: batch norm over all processes (GPUs only).
        dist_bn: batch norm's statistics at the end of an epoch: "reduce" averages those of all processes, "broadcast"
            takes those of the main one.
        profile: updates whose trace goes to profile/ in the run directory; 0 is none.
        report_to: names of Accelerate's trackers, e.g. ("tensorboard", "wandb"), or one name.
        wandb_project, wandb_tags: of the run in Weights & Biases; None is "timm-selfdistill".
        push_to_hub: upload the best model at the end of the run, and with the hub_strategy "best" every new best
            one, with "epoch" the last one after every epoch, too, in the background.
        hub_model_id: repository, "user/name" or "name"; None is the name of the run directory.
        hub_private: make a private repository.
        hub_license: of the model card, e.g. "mit"; None is that of the weights that the training begins with, and
            Apache-2.0, timm's own, where settings["pretrained"] is False.
        settings: anything else that config.yaml should record, e.g. the model's name, under names of its own.

    Paths, and scalars and arrays of numpy and torch, become what YAML has for them.

    Raises:
        ValueError: a value is out of its range, or `settings` hold a name of the above.
        TypeError: `settings` hold what YAML cannot tell.
    """

    output: str = ""
    resume: str | None = None
    no_resume_opt: bool = False
    device: str | None = None
    seed: int = 42
    epochs: int = 6
    start_epoch: int = 0
    batch_size: int | str = 64
    validation_batch_size: int | None = None
    steps_per_epoch: int | None = None
    train_num_samples: int | None = None
    epoch_repeats: float = 0.0
    shuffle_buffer: int = 1000
    aug_repeats: float = 0.0
    opt: str = "sgd"
    opt_eps: float | None = None
    opt_betas: tuple[float, ...] | None = None
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.05
    lr_base: float | None = None
    lr_base_size: int = 256
    lr_base_scale: str = ""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    layer_decay: float | None = None
    layer_decay_min_scale: float = 0.0
    layer_decay_no_opt_scale: float | None = None
    head_lr_scale: float = 1.0
    head_warmup_epochs: int = 0
    unlabelled: bool = False
    cache_features: bool = False
    sched: str = "cosine"
    sched_on_updates: bool = True
    warmup_epochs: float = 1.0
    warmup_prefix: bool = False
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    cooldown_epochs: int = 0
    lr_noise: tuple[float, ...] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0
    lr_cycle_mul: float = 1.0
    lr_cycle_decay: float = 0.5
    lr_cycle_limit: int = 1
    lr_k_decay: float = 1.0
    lr_decay_fn: str | None = None
    lr_stable_timescale: float | None = None
    decay_epochs: float | None = None
    decay_milestones: tuple[int, ...] = (90, 180, 270)
    decay_rate: float = 0.1
    patience_epochs: int = 10
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, ...] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    amp: bool = False
    amp_dtype: str = "float16"
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = "norm"
    channels_last: bool = False
    torchcompile: bool | str = False
    torchcompile_mode: str | None = None
    workers: int = 2
    log_interval: int = 50
    checkpoint_interval: str = ""
    checkpoint_hist: int = 3
    val_interval: int = 1
    eval_metric: str = "top1"
    on_bad_sample: str = "raise"
    on_nan: str = "raise"
    sync_bn: bool = False
    dist_bn: str = "reduce"
    profile: int = 0
    report_to: tuple[str, ...] = ()
    wandb_project: str | None = None
    wandb_tags: tuple[str, ...] = ()
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False
    hub_license: str | None = None
    hub_strategy: str = "end"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for a value that cannot work, before anything is spent on it."""
        for entry in fields(self):
            setattr(self, entry.name, plain_value(getattr(self, entry.name), entry.name))
        self._check_settings()
        for name in ("report_to", "decay_milestones", "opt_betas", "lr_noise", "cutmix_minmax", "wandb_tags"):
            if getattr(self, name) is not None:
                setattr(self, name, _as_tuple(getattr(self, name)))
        self.checkpoint_interval = str(self.checkpoint_interval or "")
        if isinstance(self.profile, bool) or not isinstance(self.profile, int):
            raise ValueError(f"profile must be a number of updates, got {self.profile!r}")
        self._check_counts()
        self._check_ranges()
        self._check_combinations()
        known = list_optimizers()
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

    def _check_counts(self) -> None:
        """Make whole numbers of those that count something."""
        for name in WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError(f"{name} must be a whole number, got {value}")
            setattr(self, name, int(value) if isinstance(value, float) else value)
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f'batch_size must be a number or "auto", got {self.batch_size!r}')
        if isinstance(self.validation_batch_size, str):
            raise ValueError(f"validation_batch_size must be a number, got {self.validation_batch_size!r}")
        for name in (
            "epochs",
            "batch_size",
            "validation_batch_size",
            "steps_per_epoch",
            "shuffle_buffer",
            "grad_accum_steps",
            "log_interval",
            "checkpoint_hist",
            "lr_base_size",
            "val_interval",
            "train_num_samples",
        ):
            value = getattr(self, name)
            if value is not None and (name, value) != ("batch_size", "auto") and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def _check_ranges(self) -> None:
        for name in (
            "seed",
            "lr",
            "warmup_lr",
            "min_lr",
            "momentum",
            "weight_decay",
            "warmup_epochs",
            "decay_rate",
            "head_lr_scale",
            "head_warmup_epochs",
            "layer_decay_min_scale",
            "lr_noise_pct",
            "lr_noise_std",
            "lr_cycle_mul",
            "lr_cycle_decay",
            "lr_cycle_limit",
            "lr_k_decay",
            "mixup",
            "cutmix",
            "mixup_off_epoch",
            "workers",
            "profile",
            "start_epoch",
            "cooldown_epochs",
            "patience_epochs",
            "epoch_repeats",
            "aug_repeats",
        ):
            if not (is_number(value := getattr(self, name)) and 0 <= value < float("inf")):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        for name in ("mixup_prob", "mixup_switch_prob", "model_ema_decay"):
            if not (is_number(value := getattr(self, name)) and 0 <= value <= 1):
                raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        parse_interval(self.checkpoint_interval)
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")
        if self.decay_epochs is not None and not self.decay_epochs > 0:
            raise ValueError(f"decay_epochs must be > 0, got {self.decay_epochs}")
        if list(self.decay_milestones) != sorted(set(self.decay_milestones)):
            raise ValueError(f"decay_milestones must increase, got {self.decay_milestones}")
        if self.lr_noise is not None and (
            len(self.lr_noise) > 2
            or list(self.lr_noise) != sorted(self.lr_noise)
            or not all(0 <= share <= 1 for share in self.lr_noise)
        ):
            raise ValueError(f"lr_noise must be one share of the run, or two that increase, got {self.lr_noise}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be > 0, got {self.clip_grad}")
        if self.cutmix_minmax is not None and (
            len(self.cutmix_minmax) != 2 or not 0 <= self.cutmix_minmax[0] <= self.cutmix_minmax[1] <= 1
        ):
            raise ValueError(f"cutmix_minmax must be two shares, the least and the most, got {self.cutmix_minmax}")

    def _check_combinations(self) -> None:
        """Settings that are right alone, but not together."""
        if self.head_warmup_epochs >= self.epochs and self.head_warmup_epochs:
            raise ValueError(
                f"head_warmup_epochs must be less than epochs ({self.epochs}), got {self.head_warmup_epochs}; to train"
                " the heads alone, freeze the backbone"
            )
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


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
