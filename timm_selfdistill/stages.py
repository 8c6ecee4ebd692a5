"""Where the exits stand: the stage boundaries that timm's `feature_info` describes."""
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


class Stage(NamedTuple):
    """A stage boundary of a timm model, one entry of its `feature_info`."""

    index: int
    """Position in `feature_info`, as `forward_intermediates(indices=...)` counts."""
    name: str
    """Name of the module that ends the stage, e.g. "layer1"."""
    channels: int
    """Channels of the feature map (B, channels, H, W) there."""
    reduction: int
    """Input pixels per feature pixel along one side."""


def check_timm_classifier(model: nn.Module) -> None:
    """Raise unless `model` is a timm model that classifies.

    Raises:
        TypeError: `model` is not a timm model, or one made with `features_only=True`.
        ValueError: it has no classifier.
    """
    needed = ("feature_info", "forward_intermediates", "forward_head", "pretrained_cfg", "num_classes")
    missing = [name for name in needed if not hasattr(model, name)]
    if not isinstance(model, nn.Module) or missing:
        raise TypeError(
            f"expected a timm model, got {type(model).__module__}.{type(model).__qualname__}"
            f"{' without ' + ', '.join(missing) if isinstance(model, nn.Module) else ''};"
            ' create one with timm.create_model("resnet18"), not features_only'
        )
    if not model.num_classes:
        raise ValueError(
            f"{type(model).__name__} has no classifier (num_classes=0), so nothing can teach its exits;"
            " create it with timm.create_model(..., num_classes=K), K >= 1; encoders without a head cannot be used"
        )


def read_stages(model: nn.Module) -> list[Stage]:
    """All stage boundaries of a timm model, shallow to deep."""
    return [
        Stage(index, info["module"], info["num_chs"], info["reduction"])
        for index, info in enumerate(model.feature_info)
    ]


def select_stages(stages: list[Stage], exits: Sequence[int | str] | None = None) -> list[Stage]:
    """The stages that carry a classifier, the teacher (always the last stage) included.

    Args:
        stages: all stages of the model.
        exits: `feature_info` indices or module names, ascending; the last stage may be named or left out. None chooses:

            - columns (one resolution throughout, e.g. ViT): a quarter, half and three quarters of the depth;
            - pyramids: the three stages before the last; where there are fewer, all of them. Networks with a stem
              level usually have five levels, so the stem is left out.

    Raises:
        ValueError: `exits` is empty, unknown, out of range, repeated or not ascending.
        TypeError: `exits` holds something else than int and str.
    """
    last = len(stages) - 1
    if last < 1:
        raise ValueError(f"the model has {len(stages)} feature level(s), but an exit and the teacher need 2")
    if exits is None:
        if stages[0].reduction == stages[last].reduction:
            chosen = sorted({-(-len(stages) * quarter // 4) - 1 for quarter in (1, 2, 3)} - {last})
        else:
            chosen = list(range(max(0, last - 3), last))
        return [stages[index] for index in [*chosen, last]]

    if isinstance(exits, (str, bytes)) or not isinstance(exits, Sequence):
        raise TypeError(f"exits must be a sequence of feature_info indices or module names, got {exits!r}")
    chosen = [_find_stage(stages, exit) for exit in exits]
    if chosen and chosen[-1] == last:
        chosen.pop()
    if not chosen:
        raise ValueError(f"exits={list(exits)} names no shallow exit; choose from {_describe(stages[:-1])}")
    if chosen != sorted(set(chosen)):
        raise ValueError(
            f"exits={list(exits)} must be ascending without repeats, shallow to deep: {_describe(stages[:-1])}")
    return [stages[index] for index in [*chosen, last]]


def _find_stage(stages: list[Stage], exit: int | str) -> int:
    if isinstance(exit, bool) or not isinstance(exit, (int, str)):
        raise TypeError(f"an exit is a feature_info index (int) or a module name (str), got {exit!r}")
    for stage in stages:
        if exit in (stage.index, stage.name):
            return stage.index
    raise ValueError(f"exit {exit!r} does not exist in this model; choose from {_describe(stages[:-1])}")


def _describe(stages: list[Stage]) -> str:
    return ", ".join(f"{stage.index} ({stage.name})" for stage in stages)
