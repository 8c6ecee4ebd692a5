"""Where the exits stand: the stage boundaries that timm's `feature_info` describes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .cost import default_input_size
from .timm_model import TimmModel, as_timm


@dataclass(frozen=True)
class Stage:
    """A stage boundary of a timm model, one entry of its `feature_info`."""

    index: int
    """Position in `feature_info`, as `forward_intermediates(indices=...)` counts."""
    name: str
    """Name of the module that ends the stage, e.g. "layer1"."""
    channels: int
    """Channels of the feature map (B, channels, H, W) there."""
    reduction: int
    """Input pixels per feature pixel along one side."""

    def __str__(self) -> str:
        return f"level {self.index} ({self.name})"


def check_timm_classifier(model: nn.Module) -> TimmModel:
    """The same model; raises unless it is a timm model that classifies.

    Raises:
        TypeError: `model` is not a timm model, or one made with `features_only=True`.
        ValueError: it has no classifier.
    """
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "expected a timm model, got one that torch.compile has wrapped, which can neither be saved nor cut into"
            " stages; compile last: torch.compile(wrap_self_distill(model))"
        )
    needed = ("feature_info", "forward_intermediates", "forward_head", "pretrained_cfg", "num_classes")
    missing = [name for name in needed if not hasattr(model, name)]
    if not isinstance(model, nn.Module) or missing:
        raise TypeError(
            f"expected a timm model, got {type(model).__module__}.{type(model).__qualname__}"
            f"{' without ' + ', '.join(missing) if isinstance(model, nn.Module) else ''};"
            ' create one with timm.create_model("resnet18"), not features_only'
        )
    if not as_timm(model).num_classes:
        raise ValueError(
            f"{type(model).__name__} has no classifier (num_classes=0), so nothing can teach its exits;"
            " create it with timm.create_model(..., num_classes=K), K >= 1; encoders without a head cannot be used"
        )
    return as_timm(model)


def explain_misfit(model: nn.Module, x: Tensor, model_args: dict[str, Any] | None = None) -> str | None:
    """Why a timm model cannot take images x (B, in_chans, H, W), as far as their shape says; else None."""
    channels, *size = default_input_size(model, model_args)
    name = type(model).__name__
    if x.ndim != 4 or x.shape[1] != channels:
        return f"{name} takes images of the shape (B, {channels}, H, W), got {tuple(x.shape)}"
    is_fixed = getattr(getattr(model, "patch_embed", None), "strict_img_size", True)
    if is_fixed and as_timm(model).pretrained_cfg.get("fixed_input_size") and [*x.shape[2:]] != size:
        return (
            f"{name} takes images of {size[0]}x{size[1]} pixels only, got {x.shape[2]}x{x.shape[3]}; resize them, or"
            f" create it with timm.create_model(..., img_size={tuple(x.shape[2:])}) where it has that argument"
        )
    return None


def read_stages(model: nn.Module) -> list[Stage]:
    """All stage boundaries of a timm model, shallow to deep."""
    return [
        Stage(index, info["module"], info["num_chs"], info["reduction"])
        for index, info in enumerate(as_timm(model).feature_info)
    ]


def choose_exits(model: nn.Module) -> list[Stage]:
    """Where the shallow exits of a timm model stand unless told otherwise; the teacher, its last level, follows them.

    Levels that say nothing new are left out first: of several levels of one module (the branches of a CrossViT) only
    the last counts, and a level is no exit where no parameters lie between it and the last (VGG's last pooling). Then

    - columns (one resolution throughout, e.g. ViT) get exits at a quarter, half and three quarters of the depth;
    - pyramids get the three levels before the last; where there are fewer, all of them. Networks with a stem level
      usually have five levels, so the stem is left out.

    Raises:
        ValueError: nothing is left.
    """
    stages = list({stage.name: stage for stage in read_stages(model)}.values())
    last = stages.pop()
    while stages and _count_params(model, stages[-1].name) >= _count_params(model, last.name) > 0:
        stages.pop()
    if not stages:
        raise ValueError(f"{type(model).__name__} has no level for an exit before its last, {last}; name exits=[...]")
    if stages[0].reduction == last.reduction:
        levels = len(stages) + 1
        chosen = sorted({-(-levels * quarter // 4) - 1 for quarter in (1, 2, 3)} - {levels - 1})
        return [*(stages[index] for index in chosen), last]
    return [*stages[-3:], last]


def select_stages(model: nn.Module, exits: Sequence[int | str] | None = None) -> list[Stage]:
    """The stages of a timm model that carry a classifier, the teacher (always the last stage) included.

    Args:
        exits: `feature_info` indices or module names, ascending; the last stage may be named or left out. None leaves
            it to `choose_exits`.

    Raises:
        ValueError: the model has no two levels, or `exits` is empty, unknown, out of range, repeated or not ascending.
        TypeError: `exits` holds something else than int and str.
    """
    stages = read_stages(model)
    last = len(stages) - 1
    if last < 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stages)} feature level(s), but an exit and the teacher need 2"
        )
    if exits is None:
        return choose_exits(model)

    if isinstance(exits, (str, bytes)) or not isinstance(exits, Sequence):
        raise TypeError(f"exits must be a sequence of feature_info indices or module names, got {exits!r}")
    chosen = [_find_stage(model, stages, exit) for exit in exits]
    if chosen and chosen[-1] == last:
        chosen.pop()
    if not chosen:
        raise ValueError(f"exits={list(exits)} names no shallow exit; choose from {_describe(stages[:-1])}")
    if chosen != sorted(set(chosen)):
        raise ValueError(
            f"exits={list(exits)} must be ascending without repeats, shallow to deep: {_describe(stages[:-1])}"
        )
    return [stages[index] for index in [*chosen, last]]


def _count_params(model: nn.Module, name: str) -> int:
    """Parameter tensors up to the end of a module, in the order of registration; 0 where `name` is no module."""
    modules = list(model.named_modules())
    ends = [index for index, (found, _) in enumerate(modules, 1) if f"{found}.".startswith(f"{name}.")]
    return sum(len(module._parameters) for _, module in modules[: max(ends, default=0)])


def _find_stage(model: nn.Module, stages: list[Stage], exit: int | str) -> int:
    if isinstance(exit, bool) or not isinstance(exit, (int, str)):
        raise TypeError(f"an exit is a feature_info index (int) or a module name (str), got {exit!r}")
    found = [stage.index for stage in stages if exit in (stage.index, stage.name)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no level {exit!r} for an exit; choose from {_describe(stages[:-1])}"
        )
    if len(found) > 1:
        raise ValueError(f"{exit!r} ends the levels {found} of {type(model).__name__}; choose one by its index")
    return found[0]


def _describe(stages: list[Stage]) -> str:
    return ", ".join(f"{stage.index} ({stage.name})" for stage in stages)
