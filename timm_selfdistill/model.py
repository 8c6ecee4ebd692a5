"""One verb turns a timm model into a network that teaches itself."""
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cost import count_cost, default_input_size
from .heads import HeadFactory, check_output, create_head, move_alike, resize_feature
from .hub import HubMixin, measured_rows
from .output import BackboneOutput, SelfDistillOutput
from .stages import check_logits, check_timm_classifier, explain_misfit, select_stages
from .summary import Summary, summarize
from .timm_methods import TimmMethods


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


class SelfDistillModel(TimmMethods, nn.Module, HubMixin):
    """A timm model with shallow classifiers; made by `wrap_self_distill`.

    Attributes:
        backbone: the timm model.
        stages: one `Stage` per shallow exit, shallow to deep.
        heads: one head per shallow exit.
        exits: the module names of all C classifiers, the deepest included.
        num_classes: K.
        early_exit: what `EarlyExit.calibrate` found; saved with the model.
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
        self.early_exit: dict[str, Any] | None = None
        self._trained_size: tuple[int, int] | None = None
        self._waiting: list[nn.Parameter] = []
        self.backbone = model
        self.heads = nn.ModuleList(
            create_head(head, stage, self._last_stage, self.num_classes, self.head_args, type(model).__name__)
            for stage in self.stages)

        move_alike(self.heads, model)
        self.training = model.training
        self.heads.train(model.training)
        if freeze_backbone:
            model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "SelfDistillModel":
        super().train(mode)
        if self.freeze_backbone or self._waiting:
            self.backbone.eval()
        return self

    def train_classifiers_alone(self, alone: bool) -> None:
        """Let the backbone's features wait, in eval mode and without gradients, while its classifier and the shallow
        ones learn; or let all learn again that did before."""
        if alone and not self._waiting:
            classifier = set(map(id, self.get_classifier().parameters()))
            self._waiting = [p for p in self.backbone.parameters() if p.requires_grad and id(p) not in classifier]
        for parameter in self._waiting:
            parameter.requires_grad_(not alone)
        self._waiting = self._waiting if alone else []
        self.train(self.training)

    def forward(self, x: Tensor | BackboneOutput) -> SelfDistillOutput | Tensor:
        """Training mode: what every classifier says. Eval mode: the deepest logits (B, K), the backbone's own.

        Args:
            x: images (B, in_chans, H, W), or what `forward_backbone` gave for them.
        """
        if self.training:
            if not isinstance(x, BackboneOutput):
                self._trained_size = tuple(x.shape[2:])
            return self.forward_exits(x)
        return x.logits if isinstance(x, BackboneOutput) else self._run(x, self.backbone)

    def forward_exits(self, x: Tensor | BackboneOutput) -> SelfDistillOutput:
        """What every classifier says, in either mode, for images (B, in_chans, H, W), or for what `forward_backbone`
        gave for them."""
        maps, deepest = x if isinstance(x, BackboneOutput) else self.forward_backbone(x)
        teacher = maps[-1]
        shallow = [self._run_head(exit, feature_map) for exit, feature_map in enumerate(maps[:-1])]
        return SelfDistillOutput(
            logits=(*(logits for logits, _ in shallow), deepest),
            features=(*(resize_feature(feature, teacher) for _, feature in shallow), teacher),
        )

    def forward_backbone(self, x: Tensor) -> BackboneOutput:
        """What the backbone gives the shallow classifiers for images (B, in_chans, H, W); a frozen one always the
        same."""
        indices = [stage.index for stage in [*self.stages, self._last_stage]]
        learning = torch.is_grad_enabled() and not self.freeze_backbone
        with torch.set_grad_enabled(learning and not self._waiting):
            final, maps = self._run(x, lambda x: self.backbone.forward_intermediates(x, indices=indices))
        with torch.set_grad_enabled(learning):
            deepest = self.backbone.forward_head(final)
        check_logits(self.backbone, deepest, (x.shape[0], self.num_classes))
        return BackboneOutput(tuple(maps), deepest)

    def _run_head(self, exit: int, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        stage = self.stages[exit]
        where = f"{type(self.backbone).__name__} at {stage}"
        return check_output(
            self.heads[exit](feature_map), feature_map.shape[0], self.num_classes, self._last_stage.channels, where)

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
        exit = self._exit_number(exit)
        if exit == "ensemble":
            return torch.stack(self.forward_exits(x).logits).mean(0)
        if exit == len(self.stages):
            return self._run(x, self.backbone)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            (feature_map,) = self._run(x, lambda x: self.backbone.forward_intermediates(
                x, indices=[self.stages[exit].index], stop_early=True, intermediates_only=True))
        return self._run_head(exit, feature_map)[0]

    def _exit_number(self, exit: int | str) -> int | str:
        """0 to C - 1, or "ensemble"."""
        count = len(self.exits)
        if exit == "ensemble":
            return exit
        if isinstance(exit, bool) or not isinstance(exit, int) or not -count <= exit < count:
            raise ValueError(f"exit must be 0 to {count - 1}, -1 to -{count} or 'ensemble', got {exit!r}")
        return exit % count

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the model is for: those of the last training batch, or before
        any those that the backbone was made for. Saved with the model."""
        channels, *own_size = default_input_size(self.backbone, self.model_args)
        return channels, *(self._trained_size or own_size)

    def with_heads(self, heads: nn.ModuleList) -> "SelfDistillModel":
        """The same model, its backbone shared, with other heads of the same kind."""
        other = copy(self)
        other._modules = {**self._modules, "heads": heads}
        return other

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh classifiers for other classes: the backbone's own, as timm makes it, and the shallow ones."""
        pool = {} if global_pool is None else {"global_pool": global_pool}
        self.backbone.reset_classifier(num_classes, **pool)
        self.heads = nn.ModuleList(
            create_head(self.head, stage, self._last_stage, num_classes, self.head_args, type(self.backbone).__name__)
            for stage in self.stages)
        move_alike(self.heads, self.backbone)
        self.heads.train(self.training)
        self.num_classes, self.early_exit = num_classes, None
        self.model_args.pop("num_classes", None)

    def strip(self) -> nn.Module:
        """The plain timm model, for good: the shallow classifiers are not needed at inference."""
        return self.backbone

    def truncate(self, exit: int | str) -> "TruncatedModel":
        """A copy of one exit with only what it needs: a smaller network from images to the logits of `predict`.

        Args:
            exit: as of `predict`.

        Raises:
            ValueError: there is no such exit.
        """
        return TruncatedModel(deepcopy(self), self._exit_number(exit))

    def summary(self, input_size: tuple[int, int, int] | None = None) -> Summary:
        """What each exit costs, and the ensemble of all. `print(model.summary())` shows a table.

        Args:
            input_size: (channels, height, width) in pixels; None is the model's own, `input_size`.

        Raises:
            ValueError: `input_size` is nothing of the kind.
        """
        return summarize(self, [*self.stages, self._last_stage], input_size)

    @classmethod
    def from_config(cls, config: dict[str, Any], *args: Any) -> "SelfDistillModel | TruncatedModel":
        """See `HubMixin.from_config`; a truncated model's config makes that."""
        settings = config["self_distill"]
        model = super().from_config(config, *args)
        model.early_exit = settings.get("early_exit")
        exit = settings.get("truncated_to")
        return model if exit is None else TruncatedModel(model, model._exit_number(exit))


class TruncatedModel(nn.Module, HubMixin):
    """One exit of a `SelfDistillModel`, whose `truncate` makes it: images (B, in_chans, H, W) to logits (B, K).

    It trains, exports and compiles like any network. `save_pretrained` and `push_to_hub` work as there, and
    `SelfDistillModel.from_pretrained` loads it. Plain timm does not: the layers behind the exit are not there.

    Args:
        model: is taken over.
        exit: 0 to C - 1, or "ensemble".
    """

    def __init__(self, model: SelfDistillModel, exit: int | str):
        super().__init__()
        self.model, self.exit, self.num_classes = model, exit, model.num_classes
        self._whole: tuple[nn.Module] | None = None
        model.early_exit = None
        if exit == "ensemble":
            return
        for other in range(len(model.heads)):
            if other != exit:
                model.heads[other] = nn.Identity()
        if exit < len(model.stages):
            self._whole = (deepcopy(model.backbone).to("meta"),)  # in a tuple, so that it is no module of this one
            model.backbone.prune_intermediate_layers([model.stages[exit].index], prune_norm=True)

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone

    @property
    def whole(self) -> nn.Module:
        return self.model.backbone if self._whole is None else self._whole[0]

    @property
    def heads(self) -> nn.ModuleList:
        return self.model.heads

    @property
    def model_args(self) -> dict[str, Any]:
        return self.model.model_args

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the network is for."""
        return self.model.input_size

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the exit for images (B, in_chans, H, W)."""
        return self.model.predict(x, self.exit)

    @classmethod
    def from_config(cls, *args: Any) -> "SelfDistillModel | TruncatedModel":
        return SelfDistillModel.from_config(*args)

    def settings(self) -> dict[str, Any]:
        return self.model.settings() | {"truncated_to": self.exit}

    def card_rows(self, metrics: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The one exit: its cost, and what is measured of it."""
        cost = count_cost(self, self.input_size)
        module = self.model.exits[-1 if self.exit == "ensemble" else self.exit]
        measured = [row for row in measured_rows(metrics) if row["exit"] == self.exit]
        return [{"exit": self.exit, "module": module, "macs": cost.macs} | row for row in measured or [{}]]

    def rebuild(self, folder: Path) -> tuple[nn.Module, nn.Module]:
        head = None if isinstance(self.model.head, str) else self.model.head
        return self, SelfDistillModel.from_pretrained(folder, head=head)
