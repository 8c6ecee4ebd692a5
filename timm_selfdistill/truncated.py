"""One exit as a network of its own."""

from collections.abc import Mapping
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .cost import count_cost
from .heads import HeadFactory
from .hub import ExitRow, ExitSettings, HubMixin, fetch_model, measured_rows, pin, read_config
from .model import SelfDistillModel
from .stages import Stage
from .timm_model import Level, TimmModel


class TruncatedModel(HubMixin):
    """One exit of a `SelfDistillModel`, whose `truncate` makes it: images (B, in_chans, H, W) to logits (B, K).

    It trains, exports, compiles, and is traced and quantized like any network. `save_pretrained` and `push_to_hub` work
    as there, and `TruncatedModel.from_pretrained` loads it. Plain timm does not: the layers behind the exit are not
    there.

    timm's attributes and methods describe the network as it is: `feature_info` ends at the exit, `forward_features`
    gives the feature map there, `forward_head` is the exit's classifier. For the ensemble they are the backbone's,
    except for `forward_head`, which no features of one level are enough for.

    Args:
        model: is taken over.
        exit: 0 to C - 1, or "ensemble".

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import TruncatedModel, wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> fast = model.truncate(0)
        >>> fast(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> fast.save_pretrained("fast")
        >>> fast = TruncatedModel.from_pretrained("fast")
    """

    prefix = "model.backbone."
    model: SelfDistillModel

    def __init__(self, model: SelfDistillModel, exit: int | Literal["ensemble"]):
        super().__init__()
        self.model, self.exit = model, exit
        self._full_backbone: tuple[TimmModel] | None = None
        model.early_exit = None
        if exit == "ensemble":
            return
        for other in range(len(model.heads)):
            if other != exit:
                model.heads[other] = nn.Identity()
        if exit < len(model.stages):
            # in a tuple, so that it is no module of this one
            self._full_backbone = (deepcopy(model.backbone).to("meta"),)
            model.backbone.prune_intermediate_layers([model.stages[exit].index], prune_norm=True)

    @property
    def _shallow_exit(self) -> int | None:
        """The number of the exit, if it is a shallow one."""
        return None if self.exit == "ensemble" or self.exit >= len(self.model.stages) else self.exit

    @property
    def _stage(self) -> Stage | None:
        """That of a shallow exit."""
        return None if self._shallow_exit is None else self.model.stages[self._shallow_exit]

    @property
    def backbone(self) -> TimmModel:
        return self.model.backbone

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """See `SelfDistillModel.pretrained_cfg`."""
        return self.model.pretrained_cfg

    @property
    def full_backbone(self) -> TimmModel:
        return self.model.backbone if self._full_backbone is None else self._full_backbone[0]

    @property
    def heads(self) -> nn.ModuleList:
        return self.model.heads

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def model_args(self) -> dict[str, Any]:
        return self.model.model_args

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the network is for, see `SelfDistillModel.input_size`."""
        return self.model.input_size

    def warn_of_unknown_size(self) -> None:
        self.model.warn_of_unknown_size()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the exit for images (B, in_chans, H, W)."""
        return self.model.predict(x, self.exit)

    @property
    def feature_info(self) -> list[Level]:
        info = self.backbone.feature_info
        return info if self._stage is None else info[: self._stage.index + 1]

    @property
    def num_features(self) -> int:
        return super().num_features if self._stage is None else self._stage.channels

    @property
    def head_hidden_size(self) -> int:
        return super().head_hidden_size if self._stage is None else self.model.feature_channels

    def forward_features(self, x: Tensor, **kwargs: Any) -> Any:
        """The feature map (B, C, H, W) at a shallow exit for images (B, in_chans, H, W); else the backbone's own."""
        exit = self._shallow_exit
        return super().forward_features(x, **kwargs) if exit is None else self.model.run_to(exit, x)

    def forward_head(self, x: Any, pre_logits: bool = False, **kwargs: Any) -> Tensor:
        """Logits (B, K) for what `forward_features` gave; with `pre_logits`, the pooled feature (B, D) of the exit's
        classifier.

        Raises:
            ValueError: this is the ensemble.
        """
        if self.exit == "ensemble":
            raise ValueError(
                "the ensemble averages the logits of several levels, which forward_head does not get; call"
                " the model itself"
            )
        exit = self._shallow_exit
        if exit is None:
            return super().forward_head(x, pre_logits=pre_logits, **kwargs)
        return self._forward_shallow_head(exit, x, pre_logits, **kwargs)

    def _forward_shallow_head(self, exit: int, x: Tensor, pre_logits: bool = False) -> Tensor:
        logits, pooled = self.model.run_head(exit, x)
        return pooled if pre_logits else logits

    def get_classifier(self, **kwargs: Any) -> Any:
        """The exit's classifier: its last layer where it has one of the name `fc`, else the whole head."""
        exit = self._shallow_exit
        if exit is None:
            return super().get_classifier(**kwargs)
        head = self.heads[exit]
        name = f"model.heads.{exit}" + (".fc" if hasattr(head, "fc") else "")
        return name if kwargs.get("name_only") else self.get_submodule(name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for other classes, see `SelfDistillModel.reset_classifier`."""
        if self._shallow_exit is None:
            self.model.reset_classifier(num_classes, global_pool)
        elif global_pool is not None:
            raise ValueError(
                f"exit {self.exit} pools with its own classifier; global_pool={global_pool!r} is of the deepest"
            )
        else:
            self.model.reset_heads(num_classes)
            self.full_backbone.reset_classifier(num_classes)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """See `SelfDistillModel.set_input_size`."""
        self.model.set_input_size(*args, **kwargs)
        if self._shallow_exit is not None and hasattr(self.full_backbone, "set_input_size"):
            self.full_backbone.set_input_size(*args, **kwargs)

    @classmethod
    def check_kind(cls, settings: ExitSettings, name: str | PathLike) -> None:
        if "truncated_to" not in settings:
            raise ValueError(
                f"{name} is a model with all its exits; load it with SelfDistillModel.from_pretrained(...), whose"
                " truncate(exit) makes one of them a network"
            )

    @classmethod
    def from_config(
        cls, config: dict[str, Any], folder: str | PathLike, head: HeadFactory | None = None
    ) -> "TruncatedModel":
        model = SelfDistillModel.from_config(config, folder, head)
        return cls(model, model.exit_number(config["self_distill"]["truncated_to"]))

    def settings(self) -> ExitSettings:
        return {**self.model.settings(), "truncated_to": self.exit}

    def card_rows(self, metrics: Mapping[str, Any] | None) -> list[ExitRow]:
        """The one exit: its cost, and what is measured of it."""
        cost = count_cost(self, self.input_size)
        module = self.model.exits[-1 if self.exit == "ensemble" else self.exit]
        measured = [row for row in measured_rows(metrics) if row["exit"] == self.exit]
        row: ExitRow = {"exit": self.exit, "module": module, "macs": cost.macs}
        return [row | other for other in measured] or [row]

    def rebuild(self, folder: Path) -> tuple[nn.Module, nn.Module]:
        head = None if isinstance(self.model.head, str) else self.model.head
        return self, TruncatedModel.from_pretrained(folder, head=head)


def load_pretrained(
    pretrained_model_name_or_path: str | PathLike,
    *,
    revision: str | None = None,
    **load_args: Any,
) -> SelfDistillModel | TruncatedModel:
    """Load a saved model with all its exits or a truncated one, whichever a folder or repository holds.

    Args:
        pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or the id of a repository on the Hub.
        revision: branch, tag or commit.
        load_args: further arguments of `SelfDistillModel.from_pretrained`.

    Examples:
        >>> import timm
        >>> from timm_selfdistill import load_pretrained, wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> model.save_pretrained("all-exits")
        >>> model.truncate(0).save_pretrained("one-exit")
        >>> [type(load_pretrained(folder)).__name__ for folder in ("all-exits", "one-exit")]
        ['SelfDistillModel', 'TruncatedModel']
    """
    name, fetch_args = pretrained_model_name_or_path, {key: load_args[key] for key in load_args if key != "head"}
    folder = fetch_model(name, revision=revision, only_config=True, **fetch_args)
    return saved_class(read_config(folder)).from_pretrained(name, revision=pin(name, folder, revision), **load_args)


def saved_class(config: dict[str, Any]) -> type[SelfDistillModel] | type[TruncatedModel]:
    """What a config.json that `read_config` read is of."""
    return TruncatedModel if "truncated_to" in config["self_distill"] else SelfDistillModel
