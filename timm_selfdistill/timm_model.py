"""timm's models, for annotations."""

from collections.abc import Callable
from typing import Any, TypedDict, cast

from torch import Tensor, nn


class Level(TypedDict):
    """An entry of a timm model's `feature_info`."""

    module: str
    num_chs: int
    reduction: int


class TimmModel(nn.Module):
    """What this package asks of a timm model, beside what every module has.

    It only tells a type checker so: timm's models have no class of their own, and none is an instance of this one. Not
    every model has all of it, see `stages.check_timm_classifier`.
    """

    pretrained_cfg: dict[str, Any]
    feature_info: list[Level]
    num_classes: int
    num_features: int
    head_hidden_size: int
    in_chans: int
    _traits: dict[str, Any]
    forward_features: Callable[..., Any]
    forward_intermediates: Callable[..., Any]
    forward_head: Callable[..., Tensor]
    get_classifier: Callable[..., Any]
    reset_classifier: Callable[..., None]
    prune_intermediate_layers: Callable[..., Any]
    group_matcher: Callable[..., Any]
    set_grad_checkpointing: Callable[[bool], None]
    set_input_size: Callable[..., None]


def as_timm(model: nn.Module) -> TimmModel:
    """The same object: a module that is known to be a timm model, such as `timm.create_model` gives."""
    return cast(TimmModel, model)
