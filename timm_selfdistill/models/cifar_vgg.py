"""VGG19 with batch norm for CIFAR: timm's, with hidden layers that see a single pixel.

The classifier is VGG's own, two hidden layers of 4096 units with dropout 0.5, behind the 1x1 map that five poolings
leave of 32 pixels: 39.3 M parameters with 100 classes.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vgg import VGG, ConvMlp, cfgs
from torch import nn

from .cifar_cfg import cifar_cfg

__all__ = ["CifarVGG"]

default_cfgs = generate_default_cfgs(
    {
        "cifar_vgg19_bn.untrained": cifar_cfg(pool_size=(1, 1), first_conv="features.0", classifier="head.fc"),
    }
)

HIDDEN = 4096


class CifarVGG(VGG):
    """`timm.models.vgg.VGG` whose first hidden layer has a 1x1 instead of a 7x7 window."""

    def __init__(self, cfg: list[Any], num_classes: int = 100, drop_rate: float = 0.5, **kwargs: Any):
        # One hidden unit is enough of the 7x7 layer, which is replaced.
        super().__init__(cfg, num_classes, mlp_ratio=1 / HIDDEN, drop_rate=drop_rate, **kwargs)
        layers = {key: kwargs[key] for key in ("act_layer", "conv_layer", "device", "dtype") if key in kwargs}
        self.pre_logits = ConvMlp(self.num_features, HIDDEN, 1, drop_rate=drop_rate, **layers)
        self._initialize_weights()


@register_model
def cifar_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG19 (configuration E of arXiv:1409.1556) with batch norm for 32x32 images."""
    return build_model_with_cfg(
        CifarVGG,
        "cifar_vgg19_bn",
        pretrained,
        model_cfg=cfgs["vgg19"],
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3, 4, 5)},
        **{"norm_layer": nn.BatchNorm2d, **kwargs},
    )
