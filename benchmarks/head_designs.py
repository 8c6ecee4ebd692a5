"""Heads of fewer operations than those of the package, which `evidence.py` compares with them.

Each takes the place of the convolutions that halve the map one after the other: a depthwise convolution pools it to the
teacher's resolution at once, a 1x1 convolution with norm and ReLU narrows it, another widens it to the teacher's
channels, and the classifier is linear in the result.
"""

import torch.nn.functional as F
from timm.layers import GroupNorm1
from torch import Tensor, nn

from timm_selfdistill.heads import _init_weights
from timm_selfdistill.stages import Stage


class PatchPool(nn.Conv2d):
    """Learned pooling of each channel: a depthwise convolution whose kernel is its stride, (B, C, H, W) to
    (B, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, channels: int, stride: int):
        super().__init__(channels, channels, stride, stride, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down, right = -x.shape[2] % self.stride[0], -x.shape[3] % self.stride[1]
        return super().forward(F.pad(x, (0, right, 0, down)) if down or right else x)


class PooledHead(nn.Module):
    """The pooling is left out where the stage has the teacher's resolution already."""

    norm: type[nn.Module] = nn.BatchNorm2d

    def __init__(self, stage: Stage, teacher: Stage, num_classes: int):
        super().__init__()
        width = min(teacher.channels // 2, 4 * stage.channels, 256)
        stride = max(1, round(teacher.reduction / stage.reduction))
        self.bottleneck = nn.Sequential(
            PatchPool(stage.channels, stride) if stride > 1 else nn.Identity(),
            nn.Conv2d(stage.channels, width, 1, bias=False),
            self.norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, teacher.channels, 1),
        )
        self.fc = nn.Linear(teacher.channels, num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.bottleneck(x)
        return self.fc(feature.mean((2, 3))), feature


class PooledGroupNormHead(PooledHead):
    norm = GroupNorm1
