"""What a self-distilled model and its backbone give."""

from typing import NamedTuple

from torch import Tensor


class SelfDistillOutput(NamedTuple):
    """What every classifier says, shallow to deep; the last entries are the teacher's.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).train()
        >>> logits, features = model(torch.randn(2, 3, 64, 64))
        >>> len(logits), len(features)
        (4, 4)
    """

    logits: tuple[Tensor, ...]
    """C tensors (B, K)."""
    features: tuple[Tensor, ...]
    """C tensors (B, D, H, W), all of the shape of the backbone's last feature map; none where they were left out."""


class BackboneOutput(NamedTuple):
    """What the backbone gives for images; the shallow classifiers need no more."""

    maps: tuple[Tensor, ...]
    """C feature maps (B, D_i, H_i, W_i), shallow to deep, the last one the teacher's."""
    logits: Tensor
    """(B, K), of the deepest classifier."""
