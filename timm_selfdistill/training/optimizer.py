"""timm's optimizers, with learning rates by layer and for the shallow classifiers."""
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..model import SelfDistillModel
from .config import TrainConfig


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """An optimizer whose groups of parameters have, where asked for, an `lr_scale`, which timm's schedules heed.

    Raises:
        ValueError: the model has no groups of layers, or no shallow classifiers.
    """
    settings = {"opt": config.opt, "lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    if config.layer_decay is None and config.head_lr_scale == 1:
        return create_optimizer_v2(model, **settings)
    exempt = getattr(model, "no_weight_decay", set)()
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(
            model, config.weight_decay, exempt, layer_decay=config.layer_decay)
    if config.head_lr_scale != 1:
        if not isinstance(model, SelfDistillModel):
            raise ValueError(f"head_lr_scale is for shallow classifiers, which a {type(model).__name__} does not have")
        groups = _scale(groups, list(model.heads.parameters()), config.head_lr_scale)
    return create_optimizer_v2(groups, **settings)


def _scale(groups: list[dict[str, Any]], chosen: list[nn.Parameter], scale: float) -> list[dict[str, Any]]:
    """Groups in which the chosen parameters stand apart, with another learning rate."""
    ids = set(map(id, chosen))
    scaled = []
    for group in groups:
        own = group.get("lr_scale", 1.0)
        for inside, lr_scale in ((False, own), (True, own * scale)):
            if params := [param for param in group["params"] if (id(param) in ids) == inside]:
                scaled.append({**group, "params": params, "lr_scale": lr_scale})
    return scaled
