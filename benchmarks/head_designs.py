"""The bottleneck heads of version 0.1, with which the lines of `evidence.py` were measured, and group norm in those of
today, so that both can be measured again."""

from itertools import pairwise
from math import log2

import torch.nn.functional as F
from timm.layers import ConvNormAct, GroupNorm1
from torch import Tensor, nn

from timm_selfdistill.heads import BottleneckHead, _init_weights
from timm_selfdistill.stages import Stage


class HalvingConv(ConvNormAct):
    """2x2 convolution of stride 2, norm and ReLU: (B, C, H, W) to (B, out, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))


class HalvingHead(nn.Module):
    """Convolutions halve the map down to the teacher's resolution, each twice as wide as the one before; the classifier
    sees the feature after a ReLU."""

    def __init__(self, stage: Stage, teacher: Stage, num_classes: int, width: int | None = None):
        super().__init__()
        halvings = max(0, round(log2(teacher.reduction / stage.reduction)))
        width = min(teacher.channels // 4, 2 * stage.channels, 128) if width is None else width
        widths = [max(width >> remaining, 8) for remaining in reversed(range(max(halvings, 1)))]
        convs = [
            HalvingConv(chs, out_chs) if halvings else ConvNormAct(chs, out_chs, 3)
            for chs, out_chs in pairwise([stage.channels, *widths])
        ]
        self.bottleneck = nn.Sequential(*convs, ConvNormAct(widths[-1], teacher.channels, 1, apply_act=False))
        self.act = nn.ReLU()
        self.fc = nn.Linear(teacher.channels, num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.bottleneck(x)
        return self.fc(self.act(feature).mean((2, 3))), feature


class GroupNormHead(BottleneckHead):
    """`BottleneckHead` with group norm of one group."""

    def __init__(self, stage: Stage, teacher: Stage, num_classes: int, width: int | None = None):
        super().__init__(stage, teacher, num_classes, width)
        self.bottleneck[2] = GroupNorm1(self.bottleneck[2].num_features)
