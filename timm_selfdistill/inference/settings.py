"""What thresholds, temperatures and images a model takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model import SelfDistillModel
from ..stages import explain_misfit
from ..truncated import TruncatedModel
from .policy import find_policy


def check_images(model: nn.Module, x: Tensor, known_size: bool = False) -> None:
    """Raise ValueError for images that a model cannot take.

    Args:
        model: self-distilled, truncated, or a plain timm model.
        known_size: it has taken such a shape before.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"expected images as a tensor (B, C, H, W), got {type(x).__name__}")
    backbone = model
    model_args: dict[str, Any] | None = None
    if isinstance(model, (SelfDistillModel, TruncatedModel)):
        backbone, model_args = model.backbone, model.model_args
    if not known_size and (misfit := explain_misfit(backbone, x, model_args)):
        raise ValueError(misfit)
    like = next(p for p in model.parameters() if p.is_floating_point())
    if x.device != like.device or (x.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type)):
        raise ValueError(
            f"the images are {x.dtype} on {x.device}, the model's weights {like.dtype} on {like.device};"
            " convert the images with x.to(...)"
        )


def check_thresholds(
    thresholds: Sequence[float | None] | float, policy: str, model: SelfDistillModel
) -> list[float | None]:
    """One threshold for each shallow exit.

    Raises:
        ValueError: there are too few or too many, or one is no number in the policy's range.
    """
    exits, highest = len(model.stages), find_policy(policy).highest(model.num_classes)
    thresholds = thresholds.tolist() if hasattr(thresholds, "tolist") else thresholds
    if isinstance(thresholds, (int, float)) and not isinstance(thresholds, bool):
        thresholds = [thresholds] * exits
    if isinstance(thresholds, (str, bytes)) or not isinstance(thresholds, Sequence) or len(thresholds) != exits:
        raise ValueError(f"expected {exits} thresholds, one for each shallow exit, got {thresholds!r}")
    for threshold in thresholds:
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if threshold is not None and not (number and 0 <= threshold <= highest):
            raise ValueError(
                f"a threshold of the policy {policy!r} is a number from 0 to {highest:.4g}, or None for an exit that"
                f" nobody takes, got {threshold!r}"
            )
    return list(thresholds)


def check_temperatures(temperatures: Sequence[float] | None, model: SelfDistillModel) -> list[float]:
    """One temperature for each exit; 1 where None is given.

    Raises:
        ValueError: there are too few or too many, or one is no number above 0.
    """
    exits = len(model.exits)
    if temperatures is None:
        return [1.0] * exits
    if isinstance(temperatures, (str, bytes)) or not isinstance(temperatures, Sequence) or len(temperatures) != exits:
        raise ValueError(f"expected {exits} temperatures, one for each exit, got {temperatures!r}")
    for value in temperatures:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"a temperature is a number above 0, got {value!r}")
    return list(temperatures)
