"""One verb turns a timm model into a network that teaches itself."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.fx import Proxy

from .cost import default_input_size
from .heads import HeadFactory, check_logits, create_head, move_alike, run_exits, run_pooled
from .hub import CalibrationRecord, ExitRow, ExitSettings, HubMixin, build_backbone, choose_head, measured_rows
from .output import BackboneOutput, SelfDistillOutput
from .stages import Stage, check_timm_classifier, explain_misfit, select_stages
from .summary import Summary, summarize
from .timm_methods import TimmMethods
from .timm_model import TimmModel

if TYPE_CHECKING:
    from .truncated import TruncatedModel


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

    Examples:
        >>> import timm
        >>> from timm_selfdistill import wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("resnet18", num_classes=10))
        >>> model.exits
        ('layer1', 'layer2', 'layer3', 'layer4')
        >>> backbone = timm.create_model("resnet18", num_classes=10)
        >>> wrap_self_distill(backbone, exits=["layer2"], head="linear").exits
        ('layer2', 'layer4')
    """
    return SelfDistillModel(
        model, exits=exits, head=head, head_args=head_args, model_args=model_args, freeze_backbone=freeze_backbone
    )


class TrainedSize:
    """(height, width) of the images that a model was trained with last. A copy that is made before the training, such
    as a moving average, has the size of its original."""

    def __init__(self) -> None:
        self.own: tuple[int, int] | None = None
        self.original: TrainedSize | None = None
        self.saved: tuple[int, int] | None = None
        """As the files of the model tell it; holds until it is trained on."""
        self.loaded = False
        """Whether the weights come from a state dict, which does not hold the size they were trained at."""

    @property
    def trained(self) -> tuple[int, int] | None:
        return self.own if self.own or self.original is None else self.original.trained

    @property
    def known(self) -> tuple[int, int] | None:
        return self.trained or self.saved

    @property
    def untold(self) -> bool:
        """Whether the weights are those of a training whose size nobody told."""
        return self.known is None and (self.loaded or (self.original is not None and self.original.untold))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainedSize":
        copied = self._detached()
        copied.original = self if self.trained is None else None
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return vars(self._detached())

    def _detached(self) -> "TrainedSize":
        size = TrainedSize()
        size.own, size.saved, size.loaded = self.trained, self.saved, self.untold
        return size


def _note_loaded(model: "SelfDistillModel", _: Any) -> None:
    model._trained_size.loaded = True
    model.early_exit = None  # thresholds are of other weights


class SelfDistillModel(HubMixin):
    """A timm model with shallow classifiers; made by `wrap_self_distill`.

    Attributes:
        backbone: the timm model.
        stages: one `Stage` per shallow exit, shallow to deep.
        heads: one head per shallow exit.
        exits: the module names of all C classifiers, the deepest included.
        num_classes: K.
        early_exit: what `EarlyExit.calibrate` found; saved with the model.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> images = torch.randn(8, 3, 64, 64)
        >>> model(images).shape
        torch.Size([8, 10])
        >>> len(model.forward_exits(images).logits)
        4
        >>> torch.equal(model(images), model.backbone(images))
        True
        >>> model.predict(images, exit=0).shape
        torch.Size([8, 10])
    """

    backbone: TimmModel
    stages: list[Stage]
    heads: nn.ModuleList
    exits: tuple[str, ...]
    num_classes: int
    model_args: dict[str, Any]
    early_exit: CalibrationRecord | None

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
        if isinstance(model, TimmMethods):
            raise TypeError(f"this {type(model).__name__} is wrapped already; wrap the timm model in it, its backbone")
        backbone = check_timm_classifier(model)
        for name, value in (("head_args", head_args), ("model_args", model_args)):
            if value is not None and not isinstance(value, dict):
                raise TypeError(f"{name} must be a dict, got {value!r}")
        *self.stages, self._last_stage = select_stages(model, exits)
        self.exits = tuple(stage.name for stage in [*self.stages, self._last_stage])
        self.num_classes = backbone.num_classes
        self.head, self.head_args, self.model_args = head, dict(head_args or {}), dict(model_args or {})
        self.freeze_backbone = freeze_backbone
        self.early_exit = None
        self._trained_size = TrainedSize()
        self.register_load_state_dict_post_hook(_note_loaded)
        self._paused: list[nn.Parameter] = []
        self.backbone = backbone
        self.training = model.training
        self.heads = self._create_heads(self.num_classes)
        if freeze_backbone:
            model.requires_grad_(False).eval()

    def _create_heads(self, num_classes: int) -> nn.ModuleList:
        """A fresh shallow classifier for every stage, on the backbone's device, in its dtype and this model's mode."""
        heads = nn.ModuleList(
            create_head(self.head, stage, self._last_stage, num_classes, self.head_args, type(self.backbone).__name__)
            for stage in self.stages
        )
        move_alike(heads, self.backbone)
        return heads.train(self.training)

    def train(self, mode: bool = True) -> "SelfDistillModel":
        super().train(mode)
        if self.freeze_backbone or self._paused:
            self.backbone.eval()
        return self

    @property
    def feature_channels(self) -> int:
        """D, the channels of every classifier's feature."""
        return self._last_stage.channels

    def train_classifiers_alone(self, alone: bool) -> None:
        """Let the backbone's features wait, in eval mode and without gradients, while its classifier and the shallow
        ones learn; or let all learn again that did before."""
        if alone and not self._paused:
            found = self.get_classifier()
            parts = found if isinstance(found, tuple) else (found,)
            classifiers = {id(p) for part in parts for p in part.parameters()}
            self._paused = [p for p in self.backbone.parameters() if p.requires_grad and id(p) not in classifiers]
        for parameter in self._paused:
            parameter.requires_grad_(not alone)
        self._paused = self._paused if alone else []
        self.train(self.training)

    def forward(self, x: Tensor, with_features: bool = True) -> SelfDistillOutput | Tensor:
        """Training mode: what every classifier says. Eval mode: the deepest logits (B, K), the backbone's own.

        Args:
            x: images (B, in_chans, H, W).
            with_features: see `forward_exits`.
        """
        return self.forward_exits(x, with_features) if self.training else self._run(x, self.backbone)

    def forward_exits(self, x: Tensor, with_features: bool = True) -> SelfDistillOutput:
        """What every classifier says, in either mode.

        Args:
            x: images (B, in_chans, H, W).
            with_features: False leaves the features out, which only a loss with a hint needs; the heads then take less
                time, since they average their maps before the last convolution.

        Examples:
            >>> import timm, torch
            >>> from timm_selfdistill import wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
            >>> output = model.forward_exits(torch.randn(2, 3, 64, 64))
            >>> [tuple(logits.shape) for logits in output.logits]
            [(2, 10), (2, 10), (2, 10), (2, 10)]
            >>> {tuple(feature.shape) for feature in output.features}
            {(2, 96, 2, 2)}
        """
        backbone, name = self.forward_backbone(x), type(self.backbone).__name__
        channels = self.feature_channels
        return run_exits(self.heads, backbone, self.stages, self.num_classes, channels, name, with_features)

    def forward_backbone(self, x: Tensor) -> BackboneOutput:
        """What the backbone gives the shallow classifiers for images (B, in_chans, H, W); a frozen one always the
        same."""
        self.note_training(x)
        indices = [stage.index for stage in [*self.stages, self._last_stage]]
        learning = torch.is_grad_enabled() and not self.freeze_backbone
        with torch.set_grad_enabled(learning and not self._paused):
            final, maps = self._run(x, lambda x: self.backbone.forward_intermediates(x, indices=indices))
        with torch.set_grad_enabled(learning):
            deepest = self.backbone.forward_head(final)
        check_logits(self.backbone, deepest, x, self.num_classes)
        return BackboneOutput(tuple(maps), deepest)

    def note_training(self, x: Tensor) -> None:
        """Remember the size of a training batch; thresholds for early exit are of the weights as they were."""
        if isinstance(x, Proxy) or not torch.is_grad_enabled() or x.ndim != 4:  # the backbone refuses other shapes
            return
        exporting = torch.compiler.is_compiling()
        if self.training or (self._trained_size.known is None and not exporting):  # in eval mode batch norm is frozen
            height, width = x.shape[2:]
            self._trained_size.own = height, width
        if self.training and self.early_exit is not None:
            self.early_exit = None

    def run_head(self, exit: int, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and pooled feature (B, D) of a shallow classifier for the feature map of its stage."""
        head, stage, name = self.heads[exit], self.stages[exit], type(self.backbone).__name__
        return run_pooled(head, feature_map, stage, self.num_classes, self.feature_channels, name)

    def run_to(self, exit: int, x: Tensor) -> Tensor:
        """The feature map (B, C, H, W) at a shallow exit for images (B, in_chans, H, W), running no layer behind it."""
        self.note_training(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            (feature_map,) = self._run(
                x,
                lambda x: self.backbone.forward_intermediates(
                    x, indices=[self.stages[exit].index], stop_early=True, intermediates_only=True
                ),
            )
        return feature_map

    def _run(self, x: Tensor, call: Callable[[Tensor], Any]) -> Any:
        """Call the backbone; if it fails on images that it cannot take, say so."""
        try:
            return call(x)
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(x, Proxy):  # torch.fx traces it
                raise
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

        Examples:
            >>> import timm, torch
            >>> from timm_selfdistill import wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
            >>> images = torch.randn(2, 3, 64, 64)
            >>> fast, accurate = model.predict(images, exit=0), model.predict(images, exit="ensemble")
            >>> fast.shape, accurate.shape
            (torch.Size([2, 10]), torch.Size([2, 10]))
        """
        number = self.exit_number(exit)
        if number == "ensemble":
            return torch.stack(self.forward_exits(x, with_features=False).logits).mean(0)
        if number == len(self.stages):
            self.note_training(x)
            return self._run(x, self.backbone)
        return self.run_head(number, self.run_to(number, x))[0]

    def exit_number(self, exit: int | str) -> int | Literal["ensemble"]:
        """0 to C - 1, or "ensemble"."""
        count = len(self.exits)
        if exit == "ensemble":
            return "ensemble"
        if isinstance(exit, bool) or not isinstance(exit, int) or not -count <= exit < count:
            raise ValueError(f"exit must be 0 to {count - 1}, -1 to -{count} or 'ensemble', got {exit!r}")
        return exit % count

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the model is for: those of the last training batch, or before
        any those that the backbone was made for. Saved with the model."""
        channels, *own_size = default_input_size(self.backbone, self.model_args)
        return channels, *(self._trained_size.known or own_size)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The backbone's: preprocessing, class names and origin of the weights; its input_size is `input_size`."""
        if self._trained_size.known:
            self.backbone.pretrained_cfg["input_size"] = self.input_size
        return self.backbone.pretrained_cfg

    def warn_of_unknown_size(self) -> None:
        """Warn where weights from a state dict would be saved with the default image size of their architecture."""
        default = timm.get_pretrained_cfg(self.pretrained_cfg.get("architecture", ""))
        if not self._trained_size.untold or default is None or default.fixed_input_size:
            return
        if tuple(self.backbone.pretrained_cfg["input_size"][1:]) == default.input_size[1:]:
            height, width = self.input_size[1:]
            warnings.warn(
                f"the model is saved for images of {height} x {width} pixels, the default of its architecture: its"
                " weights were loaded from a state dict, which does not hold the size they were trained at; where it"
                " was another, call set_input_size(PIXELS) before saving",
                stacklevel=3,
            )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh classifiers for other classes: the backbone's own, as timm makes it, and the shallow ones.

        Thresholds that `EarlyExit.calibrate` found are dropped; make `EarlyExit` anew.

        Args:
            num_classes: K.
            global_pool: how the backbone pools its features; None leaves that as it is.

        Raises:
            ValueError: there would be no classes, the backbone is frozen, or a head given as a callable fails.

        Examples:
            >>> import timm, torch
            >>> from timm_selfdistill import wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=1000)).eval()
            >>> model.reset_classifier(7)
            >>> [logits.shape[1] for logits in model.forward_exits(torch.randn(2, 3, 64, 64)).logits]
            [7, 7, 7, 7]
        """
        if self.freeze_backbone:
            raise ValueError(
                "the backbone is frozen, so a fresh classifier on it would never learn; train the plain"
                " network for its new classes first, then wrap it"
            )
        self.reset_heads(num_classes)
        pool = {} if global_pool is None else {"global_pool": global_pool}
        self.backbone.reset_classifier(num_classes, **pool)
        self._update_model_args(pool)

    def reset_heads(self, num_classes: int) -> None:
        """Fresh shallow classifiers for other classes; where a truncated model has none, none."""
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(
                f"num_classes must be a whole number of at least 1, got {num_classes!r}; for features without"
                " classifiers use the plain network, strip()"
            )
        for exit, head in enumerate(self._create_heads(num_classes)):
            if not isinstance(self.heads[exit], nn.Identity):
                self.heads[exit] = head
        self.num_classes, self.early_exit = num_classes, None
        self.pretrained_cfg.pop("label_names", None)
        self._update_model_args({"num_classes": num_classes})

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        **more: Any,
    ) -> None:
        """Change the image size that the model is for and is saved with, `input_size`. A backbone that takes one size
        only is changed by its own `set_input_size`; one that takes any size stays as it is.

        Raises:
            TypeError: such a backbone has nothing but its image size to change.
        """
        sizes = {"img_size": img_size, "patch_size": patch_size, **more}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if hasattr(self.backbone, "set_input_size"):
            self.backbone.set_input_size(**sizes)
        elif sizes.keys() - {"img_size"}:
            raise TypeError(
                f"{type(self.backbone).__name__} takes images of any size; set_input_size can change its"
                f" img_size only, got {', '.join(sizes)}"
            )
        channels = self.input_size[0]
        self._trained_size = TrainedSize()
        if img_size is not None:
            self.backbone.pretrained_cfg["input_size"] = (channels, *to_2tuple(img_size))
        self._update_model_args(sizes)

    def _update_model_args(self, changed: dict[str, Any]) -> None:
        """What was given to `create_model` holds no longer; timm's models themselves record what is new."""
        self.model_args.update({name: changed[name] for name in self.model_args.keys() & changed.keys()})

    def strip(self) -> nn.Module:
        """The plain timm model, for good: the shallow classifiers are not needed at inference. Its `pretrained_cfg` has
        the model's `input_size`.

        Examples:
            >>> import timm
            >>> from timm_selfdistill import wrap_self_distill
            >>> backbone = timm.create_model("test_resnet", num_classes=10)
            >>> wrap_self_distill(backbone).strip() is backbone
            True
        """
        self.backbone.pretrained_cfg["input_size"] = self.input_size
        return self.backbone

    def truncate(self, exit: int | str) -> "TruncatedModel":
        """A copy of one exit with only what it needs: a smaller network from images to the logits of `predict`.

        Args:
            exit: as of `predict`.

        Raises:
            ValueError: there is no such exit.

        Examples:
            >>> import timm, torch
            >>> from timm_selfdistill import wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("resnet18", num_classes=10)).eval()
            >>> fast = model.truncate(1)
            >>> sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in model.parameters()) / 10
            True
            >>> images = torch.randn(2, 3, 64, 64)
            >>> torch.equal(fast(images), model.predict(images, exit=1))
            True
        """
        from .truncated import TruncatedModel  # which builds upon this module

        return TruncatedModel(deepcopy(self), self.exit_number(exit))

    def summary(self, input_size: tuple[int, int, int] | None = None) -> Summary:
        """What each exit costs, and the ensemble of all. `print(model.summary())` shows a table.

        Args:
            input_size: (channels, height, width) in pixels; None is the model's own, `input_size`.

        Raises:
            ValueError: `input_size` is nothing of the kind.

        Examples:
            >>> import timm
            >>> from timm_selfdistill import wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("resnet18", num_classes=10))
            >>> for row in model.summary(input_size=(3, 224, 224)):
            ...     print(row.exit, row.module, row.feature_shape)
            0 layer1 (64, 56, 56)
            1 layer2 (128, 28, 28)
            2 layer3 (256, 14, 14)
            3 layer4 (512, 7, 7)
            ensemble layer4 (512, 7, 7)
        """
        return summarize(self, [*self.stages, self._last_stage], input_size)

    @classmethod
    def check_kind(cls, settings: ExitSettings, name: str | PathLike) -> None:
        if "truncated_to" in settings:
            raise ValueError(
                f"{name} is a truncated model, which has one exit only; load it with"
                " TruncatedModel.from_pretrained(...)"
            )

    @classmethod
    def from_config(
        cls, config: dict[str, Any], folder: str | PathLike, head: HeadFactory | None = None
    ) -> "SelfDistillModel":
        """See `HubMixin.from_config`."""
        settings: ExitSettings = config["self_distill"]
        model = cls(
            build_backbone(config, folder),
            exits=settings["exits"],
            head=choose_head(settings, head, folder),
            head_args=settings["head_args"],
            model_args=config.get("model_args"),
        )
        model.early_exit = settings.get("early_exit")
        _, height, width = config["pretrained_cfg"]["input_size"]
        model._trained_size.saved = height, width
        return model

    def settings(self) -> ExitSettings:
        """See `HubMixin.settings`."""
        settings: ExitSettings = {
            "exits": [stage.index for stage in self.stages],
            "head": self.head if isinstance(self.head, str) else None,
            "head_args": self.head_args,
        }
        if self.early_exit:
            settings["early_exit"] = self.early_exit
        return settings

    def card_rows(self, metrics: Mapping[str, Any] | None) -> list[ExitRow]:
        """See `HubMixin.card_rows`."""
        measured = measured_rows(metrics)
        if measured and all({"module", "macs", "share"} <= row.keys() for row in measured):
            return measured
        costs: list[ExitRow] = [
            {"exit": row.exit, "module": row.module, "macs": row.macs, "share": row.share} for row in self.summary()
        ]
        return [cost | next((row for row in measured if row["exit"] == cost["exit"]), cost) for cost in costs]
