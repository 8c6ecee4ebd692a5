"""What timm's optimizer factory and training script ask of a model."""
from collections.abc import Callable
from typing import Any

from torch import nn

Matcher = dict[str, Any] | Callable[[str], Any]
PREFIX = "backbone."


class TimmMethods:
    """timm's questions to a model, answered by its `backbone`."""

    backbone: nn.Module

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay."""
        exempt = getattr(self.backbone, "no_weight_decay", set)()
        return {f"{PREFIX}{name}" for name in exempt}

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """Layers in groups, from the stem on, as timm's layer-wise learning rates take them; the shallow classifiers
        belong to the last group, as the deepest does.

        Raises:
            ValueError: the backbone does not tell its groups.
        """
        if not hasattr(self.backbone, "group_matcher"):
            raise ValueError(
                f"{type(self.backbone).__name__} does not tell its groups of layers (group_matcher), which layer_decay"
                " needs; leave it out")
        matcher = self.backbone.group_matcher(coarse=coarse)
        if callable(matcher):
            return lambda name: matcher(name[len(PREFIX):]) if name.startswith(PREFIX) else float("inf")
        return {group: _prefixed(pattern) for group, pattern in matcher.items()}

    def get_classifier(self) -> nn.Module:
        """The deepest classifier."""
        return self.backbone.get_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save memory in training: the backbone computes activations again in the backward pass, where it can."""
        self.backbone.set_grad_checkpointing(enable)


def _prefixed(pattern: Any) -> Any:
    """A pattern of timm, which are matched from the beginning of a name, for names that begin with "backbone."."""
    if pattern is None:
        return None
    if isinstance(pattern, (tuple, list)):
        return [(_prefixed(part), suffix) for part, suffix in pattern]
    return rf"backbone\.(?:{pattern})".replace("^", "")
