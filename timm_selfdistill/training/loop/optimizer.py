"""timm's optimizers, with learning rates per layer and for the heads of the exits, and timm's schedules."""

import math
import warnings
from collections.abc import Collection
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ...model import SelfDistillModel
from ...task import ExitHeads
from ..config import TrainConfig


def base_lr(config: TrainConfig, images: int) -> float:
    """Return the learning rate scaled from `lr_base`, as in timm's train.py.

    Args:
        images: number of images per update, over all processes and forward passes.

    Raises:
        ValueError: `lr_base` is not set.
    """
    adaptive = any(name in config.opt.lower() for name in ("ada", "lamb"))
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    if config.lr_base is None:
        raise ValueError("lr_base is not set")
    return config.lr_base * (images / config.lr_base_size) ** (0.5 if scale == "sqrt" else 1)


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer of the trainable parameters. With `layer_decay` or `head_lr_scale`, its parameter groups
    have an `lr_scale`, which timm's schedules apply.

    Raises:
        ValueError: a setting does not fit the model or the optimizer.
    """
    heads = model.heads if isinstance(model, (SelfDistillModel, ExitHeads)) else None
    if config.head_lr_scale != 1 and heads is None:
        raise ValueError("head_lr_scale needs a network with exits")
    if config.layer_decay is not None and isinstance(model, ExitHeads):
        raise ValueError("layer_decay needs a backbone that is trained, and this one is frozen; leave one of them out")
    known = get_optimizer_info(config.opt)
    for name, has in (("eps", known.has_eps), ("betas", known.has_betas)):
        if getattr(config, f"opt_{name}") is not None and not has:
            raise ValueError(f"the optimizer {config.opt} has no {name}; leave opt_{name} out")
    settings = optimizer_kwargs(config) | config.opt_kwargs
    by_layer = {
        name: settings.pop(name, None) for name in ("layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale")
    }
    if config.layer_decay is None and config.head_lr_scale == 1:
        return _create(model, settings)
    exempt: Collection[str] = getattr(model, "no_weight_decay", set)()
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(
            model,
            config.weight_decay,
            exempt,
            layer_decay=config.layer_decay,
            min_scale=by_layer["layer_decay_min_scale"],
            no_opt_scale=by_layer["layer_decay_no_opt_scale"],
        )
    if heads is not None and config.head_lr_scale != 1:
        groups = _scale(groups, list(heads.parameters()), config.head_lr_scale)
    return _create(groups, settings)


def create_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """Create timm's learning rate schedule.

    Returns:
        The schedule, None for a constant learning rate, and the number of epochs of the run, including all cycles, a
        warmup before them and a cooldown after them.

    Raises:
        ValueError: the parts of the schedule do not fit into its epochs.
    """
    settings = scheduler_kwargs(config)
    if config.sched == "plateau":
        settings["step_on_epochs"] = True
    if config.decay_epochs is None and config.sched == "step":
        settings["decay_epochs"] = 30
    # timm warns that plateau starts over on resume; `repeat_epochs` restores its state
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        schedule, epochs = create_scheduler_v2(optimizer, updates_per_epoch=updates_per_epoch, **settings)
    if schedule is None:
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return schedule, math.ceil(epochs)


def _create(parameters: nn.Module | list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(parameters, **settings)
    except (TypeError, LookupError) as error:
        raise ValueError(
            f"the optimizer {settings['opt']} does not accept one of its settings: {error}; check opt_eps,"
            " opt_betas and opt_kwargs"
        ) from error


def _scale(groups: list[dict[str, Any]], chosen: list[nn.Parameter], scale: float) -> list[dict[str, Any]]:
    """Move the chosen parameters to groups of their own, with a scaled learning rate."""
    ids = set(map(id, chosen))
    scaled = []
    for group in groups:
        own = group.get("lr_scale", 1.0)
        for inside, lr_scale in ((False, own), (True, own * scale)):
            if params := [param for param in group["params"] if (id(param) in ids) == inside]:
                scaled.append({**group, "params": params, "lr_scale": lr_scale})
    return scaled
