"""ResNets for CIFAR: timm's, with a 3x3 convolution of stride 1 as stem and no max pooling.

Widths and depths are those of the ImageNet networks (64 to 512 channels, four groups), not those of the narrow
CIFAR networks of arXiv:1512.03385.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from .cifar_cfg import cifar_cfg

__all__ = ["CifarResNet"]

default_cfgs = generate_default_cfgs(
    {f"cifar_resnet{depth}.untrained": cifar_cfg(first_conv="conv1", classifier="fc") for depth in (18, 50, 101, 152)}
)

Block = type[BasicBlock] | type[Bottleneck]


class CifarResNet(ResNet):
    """`timm.models.resnet.ResNet` at the resolution of CIFAR: layer1 to layer4 give maps of 32, 16, 8 and 4 pixels."""

    def __init__(self, block: Block, layers: tuple[int, ...], num_classes: int = 100, **kwargs: Any):
        super().__init__(block, layers, num_classes, **kwargs)  # type: ignore[arg-type]  # timm says a block, not its class
        old = self.get_parameter("conv1.weight")
        stem = nn.Conv2d(old.shape[1], old.shape[0], 3, padding=1, bias=False, device=old.device, dtype=old.dtype)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 8)):
            info["reduction"] = reduction


def _create(variant: str, pretrained: bool, block: Block, layers: tuple[int, ...], **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, block=block, layers=layers, **kwargs)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for 32x32 images: 11.22 M parameters with 100 classes."""
    return _create("cifar_resnet18", pretrained, BasicBlock, (2, 2, 2, 2), **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 for 32x32 images: 23.71 M parameters with 100 classes."""
    return _create("cifar_resnet50", pretrained, Bottleneck, (3, 4, 6, 3), **kwargs)


@register_model
def cifar_resnet101(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-101 for 32x32 images: 42.70 M parameters with 100 classes."""
    return _create("cifar_resnet101", pretrained, Bottleneck, (3, 4, 23, 3), **kwargs)


@register_model
def cifar_resnet152(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-152 for 32x32 images: 58.34 M parameters with 100 classes."""
    return _create("cifar_resnet152", pretrained, Bottleneck, (3, 8, 36, 3), **kwargs)
