"""One verb turns a timm model into a network that teaches itself."""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cost import count_cost, default_input_size
from .heads import HeadFactory, check_output, create_head
from .hub import HubMixin
from .stages import check_timm_classifier, explain_misfit, select_stages
from .summary import ExitSummary, Summary


class SelfDistillOutput(NamedTuple):
    """What every classifier says, shallow to deep; the last entries are the teacher's."""

    logits: tuple[Tensor, ...]
    """C tensors (B, K)."""
    features: tuple[Tensor, ...]
    """C tensors (B, D, H, W), all of the shape of the backbone's last feature map."""


def wrap_self_distill(
        model: nn.Module,
        *,
        exits: Sequence[int | str] | None = None,
        head: str | HeadFactory = "bottleneck",
        head_args: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
        freeze_backbone: bool = False,
) -> "SelfDistillModel":
    """Put a shallow classifier at the stage boundaries of a timm model.

    The model is kept as it is: the same object with the same weights, device, dtype, memory format and training mode;
    the heads follow it.

    Args:
        model: a timm model with a classifier, `timm.create_model("resnet18", num_classes=10)`.
        exits: where the shallow classifiers stand: `feature_info` indices or module names ("layer1"), ascending. The
            last level is always the teacher. None chooses up to three, see `stages.choose_exits`.
        head: "bottleneck" (ICCV 2019), "attention" (TPAMI 2021), "linear" (deep supervision), or a callable, see
            `heads.create_head`.
        head_args: further arguments of the head, e.g. `{"width": 64}` for "bottleneck" and "attention".
        model_args: what `create_model` was given and cannot be read back from the model, e.g. `{"img_size": 96}`;
            needed for saving, which says so, and where the image size is.
        freeze_backbone: only the heads learn; the backbone stays in eval mode, without gradients.

    Raises:
        TypeError: `model` is not a timm model, or an argument has the wrong type.
        ValueError: the model has no classifier, or `exits` or `head` names something unknown.
    """
    return SelfDistillModel(
        model, exits=exits, head=head, head_args=head_args, model_args=model_args, freeze_backbone=freeze_backbone)


class SelfDistillModel(nn.Module, HubMixin):
    """A timm model with shallow classifiers; made by `wrap_self_distill`.

    Attributes:
        backbone: the timm model.
        stages: one `Stage` per shallow exit, shallow to deep.
        heads: one head per shallow exit.
        exits: the module names of all C classifiers, the deepest included.
        num_classes: K.
    """

    def __init__(
            self,
            model: nn.Module,
            *,
            exits: Sequence[int | str] | None = None,
            head: str | HeadFactory = "bottleneck",
            head_args: dict[str, Any] | None = None,
            model_args: dict[str, Any] | None = None,
            freeze_backbone: bool = False,
    ):
        super().__init__()
        check_timm_classifier(model)
        for name, value in (("head_args", head_args), ("model_args", model_args)):
            if value is not None and not isinstance(value, dict):
                raise TypeError(f"{name} must be a dict, got {value!r}")
        *self.stages, self._last_stage = select_stages(model, exits)
        self.exits = tuple(stage.name for stage in [*self.stages, self._last_stage])
        self.num_classes = model.num_classes
        self.head, self.head_args, self.model_args = head, dict(head_args or {}), dict(model_args or {})
        self.freeze_backbone = freeze_backbone
        self.backbone = model
        self.heads = nn.ModuleList(
            create_head(head, stage, self._last_stage, self.num_classes, self.head_args, type(model).__name__)
            for stage in self.stages)

        like = next(p for p in model.parameters() if p.is_floating_point())
        self.heads.to(device=like.device, dtype=like.dtype)
        if any(p.ndim == 4 and _is_channels_last(p) for p in model.parameters()):
            self.heads.to(memory_format=torch.channels_last)
        self.training = model.training
        self.heads.train(model.training)
        if freeze_backbone:
            model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "SelfDistillModel":
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> SelfDistillOutput | Tensor:
        """Training mode: what every classifier says. Eval mode: the deepest logits (B, K), the backbone's own.

        Args:
            x: images (B, in_chans, H, W).
        """
        return self.forward_exits(x) if self.training else self._run(x, self.backbone)

    def forward_exits(self, x: Tensor) -> SelfDistillOutput:
        """What every classifier says, in either mode, for images (B, in_chans, H, W)."""
        indices = [stage.index for stage in [*self.stages, self._last_stage]]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            final, maps = self._run(x, lambda x: self.backbone.forward_intermediates(x, indices=indices))
            deepest = self.backbone.forward_head(final)
        self._check_deepest(deepest, len(x))
        teacher = maps[-1]
        shallow = [self._run_head(exit, feature_map) for exit, feature_map in enumerate(maps[:-1])]
        return SelfDistillOutput(
            logits=(*(logits for logits, _ in shallow), deepest),
            features=(*(_resize(feature, teacher) for _, feature in shallow), teacher),
        )

    def _run_head(self, exit: int, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        stage = self.stages[exit]
        where = f"{type(self.backbone).__name__} at {stage}"
        return check_output(
            self.heads[exit](feature_map), len(feature_map), self.num_classes, self._last_stage.channels, where)

    def _check_deepest(self, logits: Any, batch: int) -> None:
        name = type(self.backbone).__name__
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{name} gives {len(logits)} logits instead of one in training mode; call its"
                " set_distilled_training(False), which gives their mean")
        if logits.shape != (batch, self.num_classes):
            raise ValueError(
                f"{name} gives logits {tuple(logits.shape)}, expected {(batch, self.num_classes)}; it must pool its"
                " features (global_pool), and be wrapped again after reset_classifier")

    def _run(self, x: Tensor, call: Callable[[Tensor], Any]) -> Any:
        """Call the backbone; if it fails on images that it cannot take, say so."""
        try:
            return call(x)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = explain_misfit(self.backbone, x, self.model_args)
            if reason is None:
                raise
            raise ValueError(reason) from error

    def predict(self, x: Tensor, exit: int | str = -1) -> Tensor:
        """Logits (B, K) of one exit, running no layer behind it. Put the model in eval mode first.

        A few of timm's models, such as HRNet, make all their levels in the last layers; `summary()` shows it.

        Args:
            x: images (B, in_chans, H, W).
            exit: 0 (shallowest) to C - 1 (deepest), or -1 (deepest) to -C; "ensemble" is the mean of all logits.

        Raises:
            ValueError: there is no such exit.
        """
        if exit == "ensemble":
            return torch.stack(self.forward_exits(x).logits).mean(0)
        count = len(self.exits)
        if isinstance(exit, bool) or not isinstance(exit, int) or not -count <= exit < count:
            raise ValueError(f"exit must be 0 to {count - 1}, -1 to -{count} or 'ensemble', got {exit!r}")
        if exit % count == count - 1:
            return self._run(x, self.backbone)
        stage = self.stages[exit % count]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            (feature_map,) = self._run(x, lambda x: self.backbone.forward_intermediates(
                x, indices=[stage.index], stop_early=True, intermediates_only=True))
        return self._run_head(exit % count, feature_map)[0]

    def no_weight_decay(self) -> set[str]:
        """Parameters that the backbone exempts from weight decay, for timm's optimizer factory."""
        exempt = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in exempt}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save memory in training: the backbone computes activations again in the backward pass, where it can."""
        self.backbone.set_grad_checkpointing(enable)

    def strip(self) -> nn.Module:
        """The plain timm model, for good: the shallow classifiers are not needed at inference."""
        return self.backbone

    def summary(self, input_size: tuple[int, int, int] | None = None) -> Summary:
        """What each exit costs, and the ensemble of all. `print(model.summary())` shows a table.

        Args:
            input_size: (channels, height, width) in pixels; None is what the backbone was made for.

        Raises:
            ValueError: `input_size` is nothing of the kind.
        """
        expected = default_input_size(self.backbone, self.model_args)
        input_size = expected if input_size is None else input_size
        if not isinstance(input_size, (tuple, list)) or len(input_size) != 3 or input_size[0] != expected[0]:
            raise ValueError(f"input_size must be ({expected[0]}, height, width), got {input_size!r}")
        stages = [*self.stages, self._last_stage]
        maps = count_cost(self.backbone, input_size, lambda backbone, x: backbone.forward_intermediates(
            x, indices=[stage.index for stage in stages], intermediates_only=True)).output
        shapes = [tuple(feature_map.shape[1:]) for feature_map in maps]
        heads = [count_cost(head, shape)[:2] for head, shape in zip(self.heads, shapes)]
        head_costs = [*heads, (0, 0), tuple(map(sum, zip(*heads)))]
        costs = [count_cost(self, input_size, lambda model, x, exit=exit: model.predict(x, exit))[:2]
                 for exit in [*range(len(stages)), "ensemble"]]
        plain_macs = costs[-2][1]
        names = [*enumerate(self.exits), ("ensemble", self.exits[-1])]
        return Summary(
            ExitSummary(*name, shape, *head_cost, *cost, cost[1] / plain_macs)
            for name, shape, head_cost, cost in zip(names, [*shapes, shapes[-1]], head_costs, costs))


def _resize(feature: Tensor, teacher: Tensor) -> Tensor:
    """To the teacher's height and width, where the sizes do not divide."""
    return feature if feature.shape[2:] == teacher.shape[2:] else F.adaptive_avg_pool2d(feature, teacher.shape[2:])


def _is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
