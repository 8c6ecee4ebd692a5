"""Residual networks of three groups for CIFAR: WideResNet, ResNeXt-29 and PyramidNet.

Their groups give maps of 32, 16 and 8 pixels. The paper has four classifiers in each, but does not say where: here the
third stands within the last group, after three quarters of all blocks, so that the four sections are

    group 1 | group 2 | group 3 up to three quarters of the depth | the rest of group 3

The depth of a WideResNet is 4 + 2 * blocks (arXiv:1605.07146 counts the stem and three projections), in groups of equal
length. 20 and 44 leave 8 and 20 blocks, which three does not divide; they are read as groups of 2, 3, 3 and 6, 7, 7
blocks: the depth is the one in the name, and the longer groups are the cheaper ones.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    create_conv2d,
    get_act_layer,
    get_norm_act_layer,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnetv2 import Bottleneck, DownsampleConv, PreActBasic, ResNetV2
from torch import Tensor, nn

from .cifar_cfg import cifar_cfg

__all__ = ["CifarResNetV2", "PyramidBottleneck"]

_CFG = cifar_cfg(pool_size=(8, 8), first_conv="stem.conv", classifier="head.fc")
default_cfgs = generate_default_cfgs(
    {
        "cifar_wide_resnet20_8.untrained": _CFG,
        "cifar_wide_resnet44_8.untrained": _CFG,
        "cifar_wide_resnet28_12.untrained": _CFG,
        "cifar_resnext29_8x64d.untrained": _CFG,
        "cifar_pyramidnet101_240.untrained": _CFG,
    }
)


class CifarResNetV2(ResNetV2):
    """`timm.models.resnetv2.ResNetV2` with a 3x3 stem, and its blocks in three groups and four sections.

    Args:
        block: `(in_chs, out_chs, stride=, drop_path_rate=, act_layer=, norm_layer=, device=, dtype=)` to a residual
            block.
        depths: blocks of each of the three groups.
        channels: of every block's output, one after the other.
        stem_chs: channels of the stem.
        stem_norm: a norm without activation follows the stem's convolution.
        preact: norm and activation stand at the head of the blocks, and once more behind the last.
        act_layer, norm_layer: of all blocks, as in timm's models.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        depths: Sequence[int],
        channels: Sequence[int],
        stem_chs: int = 16,
        stem_norm: bool = False,
        preact: bool = True,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = BatchNormAct2d,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        dd = {"device": device, "dtype": dtype}
        norm, act = get_norm_act_layer(norm_layer, act_layer=act_layer), get_act_layer(act_layer)
        total, before_last = sum(depths), sum(depths[:2])
        ends = (depths[0], before_last, max(round(total * 3 / 4), before_last + 1), total)
        super().__init__(
            layers=[0, 0, 0, 0],
            channels=tuple(channels[end - 1] for end in ends),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            stem_chs=stem_chs,
            preact=preact,
            basic=preact,
            act_layer=act,
            norm_layer=norm,
            conv_layer=create_conv2d,
            drop_rate=drop_rate,
            **dd,
        )
        stem = OrderedDict(conv=create_conv2d(in_chans, stem_chs, 3, **dd))
        if stem_norm or not preact:
            stem["norm"] = norm(stem_chs, apply_act=not preact, **dd)
        self.stem = nn.Sequential(stem)

        group_starts = (depths[0], before_last)
        layers = {"act_layer": act, "norm_layer": norm, **dd}
        blocks = [
            block(in_chs, out_chs, stride=2 if index in group_starts else 1, drop_path_rate=rate, **layers)
            for index, ((in_chs, out_chs), rate) in enumerate(
                zip(pairwise([stem_chs, *channels]), calculate_drop_path_rates(drop_path_rate, total))
            )
        ]
        for stage, (start, end) in zip(self.stages, pairwise([0, *ends])):
            stage.blocks = nn.Sequential(*blocks[start:end])
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 4)):
            info["reduction"] = reduction
        self.init_weights(zero_init_last=False)


class PyramidBottleneck(nn.Module):
    """Bottleneck of PyramidNet (arXiv:1610.02915, figure 6 d): one norm more, one activation less, and a shortcut
    without parameters, which is average-pooled and padded with zero channels to the block's shape."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        drop_path_rate: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = BatchNormAct2d,
        **dd: Any,
    ):
        super().__init__()
        mid_chs = out_chs // 4
        self.norm1 = norm_layer(in_chs, apply_act=False, **dd)
        self.conv1 = create_conv2d(in_chs, mid_chs, 1, **dd)
        self.norm2 = norm_layer(mid_chs, **dd)
        self.conv2 = create_conv2d(mid_chs, mid_chs, 3, stride=stride, **dd)
        self.norm3 = norm_layer(mid_chs, **dd)
        self.conv3 = create_conv2d(mid_chs, out_chs, 1, **dd)
        self.norm4 = norm_layer(out_chs, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        self.new_chs = out_chs - in_chs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(self.pool(x), (0, 0, 0, 0, 0, self.new_chs))
        x = self.conv1(self.norm1(x))
        x = self.conv2(self.norm2(x))
        x = self.norm4(self.conv3(self.norm3(x)))
        return self.drop_path(x) + shortcut


def _wide_block(in_chs: int, out_chs: int, **kwargs: Any) -> nn.Module:
    return PreActBasic(in_chs, out_chs, proj_layer=DownsampleConv, conv_layer=create_conv2d, **kwargs)


def _resnext_block(in_chs: int, out_chs: int, **kwargs: Any) -> nn.Module:
    """8 groups of 64 channels where the output has 256, and so on."""
    projection = DownsampleConv if in_chs != out_chs else None
    return Bottleneck(
        in_chs, out_chs, bottle_ratio=2.0, groups=8, proj_layer=projection, conv_layer=create_conv2d, **kwargs
    )


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNetV2:
    return build_model_with_cfg(CifarResNetV2, variant, pretrained, feature_cfg={"flatten_sequential": True}, **kwargs)


def _wide(variant: str, pretrained: bool, depth: int, width: int, **kwargs: Any) -> CifarResNetV2:
    blocks = (depth - 4) // 2
    depths = [(blocks + group) // 3 for group in range(3)]
    channels = [16 * width * 2**group for group in range(3) for _ in range(depths[group])]
    return _create(variant, pretrained, block=_wide_block, depths=depths, channels=channels, **kwargs)


def _pyramid(variant: str, pretrained: bool, depth: int, alpha: int, **kwargs: Any) -> CifarResNetV2:
    """Channels grow by alpha / blocks from block to block, starting at 16; a bottleneck puts out four times as many."""
    blocks = (depth - 2) // 3
    channels = [4 * round(16 + alpha * (index + 1) / blocks) for index in range(blocks)]
    return _create(
        variant,
        pretrained,
        block=PyramidBottleneck,
        depths=[blocks // 3] * 3,
        channels=channels,
        stem_norm=True,
        **kwargs,
    )


@register_model
def cifar_wide_resnet20_8(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WideResNet-20-8 (arXiv:1605.07146), read as groups of 2, 3 and 3 blocks."""
    return _wide("cifar_wide_resnet20_8", pretrained, depth=20, width=8, **kwargs)


@register_model
def cifar_wide_resnet44_8(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WideResNet-44-8 (arXiv:1605.07146), read as groups of 6, 7 and 7 blocks."""
    return _wide("cifar_wide_resnet44_8", pretrained, depth=44, width=8, **kwargs)


@register_model
def cifar_wide_resnet28_12(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """WideResNet-28-12 (arXiv:1605.07146): 52.5 M parameters."""
    return _wide("cifar_wide_resnet28_12", pretrained, depth=28, width=12, **kwargs)


@register_model
def cifar_resnext29_8x64d(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """ResNeXt-29, 8x64d (arXiv:1611.05431): 34.4 M parameters."""
    channels = [256] * 3 + [512] * 3 + [1024] * 3
    return _create(
        "cifar_resnext29_8x64d",
        pretrained,
        block=_resnext_block,
        depths=(3, 3, 3),
        channels=channels,
        stem_chs=64,
        preact=False,
        **kwargs,
    )


@register_model
def cifar_pyramidnet101_240(pretrained: bool = False, **kwargs: Any) -> CifarResNetV2:
    """PyramidNet-101 with bottlenecks, alpha = 240 (arXiv:1610.02915)."""
    return _pyramid("cifar_pyramidnet101_240", pretrained, depth=101, alpha=240, **kwargs)
