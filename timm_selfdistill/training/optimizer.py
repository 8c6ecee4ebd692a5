"""timm's optimizers, with learning rates by layer and for the shallow classifiers."""
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..model import SelfDistillModel
from .config import TrainConfig
from .frozen import is_frozen, trained_part


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """An optimizer of what learns, whose groups of parameters have, where asked for, an `lr_scale`, which timm's
    schedules heed.

    Raises:
        ValueError: the model has no groups of layers, no shallow classifiers, or a frozen backbone.
    """
    if config.head_lr_scale != 1 and not isinstance(model, SelfDistillModel):
        raise ValueError("head_lr_scale is for shallow classifiers, which a network without exits does not have")
    if config.layer_decay is not None and is_frozen(model):
        raise ValueError("layer_decay is for a backbone that learns, and this one is frozen; leave one of them out")
    settings = {"opt": config.opt, "lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    trained = trained_part(model)
    if config.layer_decay is None and config.head_lr_scale == 1:
        return create_optimizer_v2(trained, **settings)
    exempt = getattr(trained, "no_weight_decay", set)()
    if config.layer_decay is None:
        groups = param_groups_weight_decay(trained, config.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(trained, config.weight_decay, exempt, layer_decay=config.layer_decay)
    if config.head_lr_scale != 1:
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
