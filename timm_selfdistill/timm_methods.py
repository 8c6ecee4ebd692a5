"""What timm's functions and scripts ask of a model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .timm_model import Level, TimmModel

Matcher = dict[str, Any] | Callable[[str], Any]


class TimmMethods:
    """timm's questions to a model, answered by its `backbone`.

    Attributes are the backbone's own objects, not copies; what the backbone does not have raises AttributeError, as
    there.
    """

    if TYPE_CHECKING:  # an attribute of one class, a property of another

        @property
        def backbone(self) -> TimmModel: ...

    prefix = "backbone."
    """Of the backbone's names among this module's parameters."""

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Preprocessing, class names and origin of the weights."""
        return self.backbone.pretrained_cfg

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's former name of `pretrained_cfg`."""
        return self.pretrained_cfg

    @property
    def feature_info(self) -> list[Level]:
        """Channels, reduction and module of every level."""
        return self.backbone.feature_info

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of `forward_head(..., pre_logits=True)`."""
        return self.backbone.head_hidden_size

    @property
    def in_chans(self) -> int:
        return self.backbone.in_chans

    @property
    def _traits(self) -> dict[str, Any]:  # of timm.models.get_model_traits: image size, and whether it is fixed
        return self.backbone._traits

    def forward_features(self, x: Tensor, **kwargs: Any) -> Any:
        """The backbone's last features for images (B, in_chans, H, W)."""
        return self.backbone.forward_features(x, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's feature maps for images (B, in_chans, H, W)."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def forward_head(self, x: Any, **kwargs: Any) -> Tensor:
        """The deepest logits (B, K) for what `forward_features` gave; with `pre_logits=True` the classifier's input."""
        return self.backbone.forward_head(x, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay."""
        exempt: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"{self.prefix}{name}" for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """Layers in groups, from the stem on, as timm's layer-wise learning rates take them; the shallow classifiers
        belong to the last group, as the deepest does.

        Raises:
            ValueError: the backbone does not tell its groups.
        """
        if not hasattr(self.backbone, "group_matcher"):
            raise ValueError(
                f"{type(self.backbone).__name__} does not tell its groups of layers (group_matcher), which layer_decay"
                " needs; leave it out"
            )
        matcher, prefix = self.backbone.group_matcher(coarse=coarse), self.prefix
        if callable(matcher):
            return lambda name: matcher(name[len(prefix) :]) if name.startswith(prefix) else float("inf")
        return {group: _prefixed(pattern, prefix.replace(".", r"\.")) for group, pattern in matcher.items()}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh classifiers for other classes."""
        raise NotImplementedError

    def get_classifier(self, **kwargs: Any) -> Any:
        """The deepest classifier; a tuple where the backbone has two. With `name_only=True`, where the backbone knows
        that, its name."""
        classifier = self.backbone.get_classifier(**kwargs)
        return f"{self.prefix}{classifier}" if isinstance(classifier, str) else classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save memory in training: the backbone computes activations again in the backward pass, where it can."""
        self.backbone.set_grad_checkpointing(enable)


def _prefixed(pattern: Any, prefix: str) -> Any:
    """A pattern of timm, which are matched from the beginning of a name, for names that begin with a prefix."""
    if pattern is None:
        return None
    if isinstance(pattern, (tuple, list)):
        return [(_prefixed(part, prefix), suffix) for part, suffix in pattern]
    return rf"{prefix}(?:{pattern})".replace("^", "")
