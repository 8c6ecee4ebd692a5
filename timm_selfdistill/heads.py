"""The shallow classifiers.

A head maps its stage's feature map to `(logits, feature)`: logits (B, K), and a feature (B, D, H', W') with the
teacher's D channels at about the teacher's resolution, which the hint loss compares with the teacher's own feature.
"""
from math import log2
from typing import Any, Callable

from timm.layers import ConvNormAct
from torch import Tensor, nn

from .stages import Stage

HeadFactory = Callable[..., nn.Module]


class BottleneckHead(nn.Module):
    """Bottleneck, pooling and fully connected layer ("Be Your Own Teacher", arXiv:1905.08094, section 3).

    Strided 3x3 convolutions halve the resolution down to the teacher's (one of stride 1 where there is nothing to
    halve), each twice as wide as the one before; a 1x1 convolution widens the last to the teacher's channels. The first
    convolution already has a stride, so nothing runs at the stage's own, expensive resolution. The feature is linear,
    so that it can match teachers of either sign; the classifier sees it after a ReLU.

    Args:
        stage: stage that the head stands on; the input is (B, stage.channels, H, W).
        teacher: last stage; the feature has its channels.
        num_classes: K.
        width: channels of the last 3x3 convolution; None is a quarter of the teacher's channels, 192 at most.
    """

    def __init__(self, stage: Stage, teacher: Stage, num_classes: int, width: int | None = None):
        super().__init__()
        width = width or min(teacher.channels // 4, 192)
        halvings = _halvings(stage, teacher)
        layers, channels = [], stage.channels
        for remaining in reversed(range(max(halvings, 1))):
            out_channels = max(width >> remaining, 8)
            kernel, stride = (2, 2) if halvings else (3, 1)
            layers.append(ConvNormAct(channels, out_channels, kernel, stride, padding="same" if halvings else ""))
            channels = out_channels
        self.bottleneck = nn.Sequential(*layers, ConvNormAct(channels, teacher.channels, 1, apply_act=False))
        self.act = nn.ReLU()
        self.fc = nn.Linear(teacher.channels, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.bottleneck(x)
        return self.fc(self.act(feature).mean((2, 3))), feature


class LinearHead(nn.Module):
    """Pooling and a linear classifier, as in deeply-supervised nets (DSN, arXiv:1409.5185).

    The map is average-pooled to the teacher's resolution and taken to its channels by a 1x1 convolution, for the hint
    loss; nothing nonlinear stands between it and the classifier, so the logits are a linear function of the pooled map.
    """

    def __init__(self, stage: Stage, teacher: Stage, num_classes: int):
        super().__init__()
        stride = 2 ** _halvings(stage, teacher)
        self.pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        self.proj = nn.Conv2d(stage.channels, teacher.channels, 1)
        self.fc = nn.Linear(teacher.channels, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.proj(self.pool(x))
        return self.fc(feature.mean((2, 3))), feature


HEADS: dict[str, HeadFactory] = {"bottleneck": BottleneckHead, "linear": LinearHead}


def create_head(
        head: str | HeadFactory,
        stage: Stage,
        teacher: Stage,
        num_classes: int,
        head_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Build the head of one stage.

    Args:
        head: a name in `HEADS`, or a callable `(stage, teacher, num_classes, **head_args)` that returns a module which
            maps (B, stage.channels, H, W) to `(logits (B, num_classes), feature (B, teacher.channels, H', W'))`.

    Raises:
        ValueError: the name is unknown.
        TypeError: `head` is neither a name nor a callable, or does not take `head_args`.
    """
    if isinstance(head, str) and head not in HEADS:
        raise ValueError(f"unknown head {head!r}; choose from {', '.join(sorted(HEADS))}, or pass a callable")
    factory = HEADS[head] if isinstance(head, str) else head
    if not callable(factory):
        raise TypeError(f"head must be one of {', '.join(sorted(HEADS))} or a callable, got {head!r}")
    return factory(stage, teacher, num_classes, **(head_args or {}))


def _halvings(stage: Stage, teacher: Stage) -> int:
    return max(0, round(log2(teacher.reduction / stage.reduction)))
