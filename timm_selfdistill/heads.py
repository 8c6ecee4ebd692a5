"""The shallow classifiers.

A head maps its stage's feature map to `(logits, feature)`: logits (B, K), and a feature (B, D, H', W') with the
teacher's D channels at about the teacher's resolution, which the hint loss compares with the teacher's own feature.
"""

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from math import ceil, sqrt
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import SeparableConvNormAct
from torch import Tensor, nn
from torch.fx import Proxy

from .output import BackboneOutput, SelfDistillOutput
from .stages import Stage

HeadFactory = Callable[..., nn.Module]


class PatchPool(nn.Conv2d):
    """Learned pooling: a depthwise convolution whose kernel is as large as its stride.

    (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)); zeros on all sides fill up what does not divide.
    """

    def __init__(self, channels: int, stride: int):
        super().__init__(channels, channels, stride, stride, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pool_patches(x, self.weight)


@torch.fx.wrap
def pool_patches(x: Tensor, weight: Tensor) -> Tensor:
    """What `PatchPool` does; one step in torch.fx, where the padding would depend on a size."""
    stride = weight.shape[2]
    height, width = (ceil(-size % stride / 2) for size in x.shape[2:])
    return F.conv2d(x, weight, stride=stride, padding=(height, width), groups=len(weight))


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)`, but torch's batch norm does not count the batches in training: a kernel of its own, which only a
    cumulative average (momentum=None) needs."""
    if type(norm) is not nn.BatchNorm2d or not norm.training or norm.momentum is None or isinstance(x, Proxy):
        return norm(x)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)


class ProjectedHead(nn.Module):
    """A head that ends in a 1x1 convolution to the teacher's channels, an average over the map and a linear classifier.

    Attributes:
        proj: the convolution.
        fc: the classifier.
    """

    proj: nn.Conv2d
    fc: nn.Linear

    def narrow(self, x: Tensor) -> Tensor:
        """A stage's map (B, C, H, W) to what `proj` takes (B, width, H', W')."""
        raise NotImplementedError

    def forward(self, x: Tensor, with_feature: bool = True) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the feature (B, D, H', W'), or without it its average (B, D)."""
        narrow = self.narrow(x)
        # the average comes first, so that the convolution has a single pixel to take to D channels
        pooled = self.proj(narrow.mean((2, 3), keepdim=True))
        logits = self.fc(pooled.flatten(1))
        if not with_feature:
            return logits, pooled.flatten(1)
        return logits, pooled if narrow.shape[2:] == (1, 1) else self.proj(narrow)


class BottleneckHead(ProjectedHead):
    """Bottleneck, pooling and fully connected layer ("Be Your Own Teacher", arXiv:1905.08094, section 3).

    Where the paper's bottleneck halves the map several times over, this one reaches the teacher's resolution in one
    step, since a kernel-launch bound GPU takes its time for every operation: a depthwise convolution pools the map, a
    1x1 convolution with batch norm and ReLU narrows it, and another widens it to the teacher's channels. The feature is
    linear, so that it can match teachers of either sign.

    Args:
        stage: stage that the head stands on; the input is (B, stage.channels, H, W).
        teacher: last stage; the feature has its channels.
        num_classes: K.
        width: channels between the two 1x1 convolutions; None is half of the teacher's channels, at most four times
            the stage's and at most 256.

    Raises:
        ValueError: `width` is not a whole number >= 1.
    """

    def __init__(self, stage: Stage, teacher: Stage, num_classes: int, width: int | None = None):
        super().__init__()
        width = self.default_width(stage, teacher) if width is None else width
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"width must be a whole number of channels, at least 1, got {width!r} ({stage})")
        stride = _stride(stage, teacher)
        self.bottleneck = nn.Sequential(
            PatchPool(stage.channels, stride) if stride > 1 else nn.Identity(),
            nn.Conv2d(stage.channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.proj = nn.Conv2d(width, teacher.channels, 1)
        self.fc = nn.Linear(teacher.channels, num_classes)
        self.apply(_init_weights)

    def default_width(self, stage: Stage, teacher: Stage) -> int:
        return max(min(teacher.channels // 2, 4 * stage.channels, 256), 1)

    def narrow(self, x: Tensor) -> Tensor:
        pool, conv, norm, act = self.bottleneck
        return act(batch_norm(norm, conv(pool(x))))


class AttentionHead(BottleneckHead):
    """Attention mask before a bottleneck (the journal version, doi 10.1109/TPAMI.2021.3067100).

    A mask between 0 and 1 for every value of the stage's feature map says what of it this classifier looks at, so that
    the backbone can keep there what only the later layers need. It is made at half the resolution, by a separable
    convolution to a quarter of the channels and a 1x1 convolution back, and enlarged bilinearly. What is left goes
    through a bottleneck of half the width of `BottleneckHead`'s.

    Args:
        stage, teacher, num_classes, width: as of `BottleneckHead`.
    """

    def __init__(self, stage: Stage, teacher: Stage, num_classes: int, width: int | None = None):
        super().__init__(stage, teacher, num_classes, width)
        squeezed = max(stage.channels // 4, 8)
        self.attention = nn.Sequential(
            SeparableConvNormAct(stage.channels, squeezed, 3, stride=2), nn.Conv2d(squeezed, stage.channels, 1)
        )
        self.attention.apply(_init_weights)

    def default_width(self, stage: Stage, teacher: Stage) -> int:
        return max(super().default_width(stage, teacher) // 2, 1)

    def narrow(self, x: Tensor) -> Tensor:
        return super().narrow(x * F.interpolate(self.attention(x), x.shape[2:], mode="bilinear").sigmoid())


class LinearHead(ProjectedHead):
    """Pooling and a linear classifier, as in deeply-supervised nets (DSN, arXiv:1409.5185).

    The map is average-pooled to the teacher's resolution and taken to its channels by a 1x1 convolution, for the hint
    loss; nothing nonlinear stands between it and the classifier, so the logits are a linear function of the pooled map.
    """

    def __init__(self, stage: Stage, teacher: Stage, num_classes: int):
        super().__init__()
        stride = _stride(stage, teacher)
        self.pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        self.proj = nn.Conv2d(stage.channels, teacher.channels, 1)
        self.fc = nn.Linear(teacher.channels, num_classes)
        self.apply(_init_weights)

    def narrow(self, x: Tensor) -> Tensor:
        return self.pool(x)


HEADS: dict[str, HeadFactory] = {"bottleneck": BottleneckHead, "attention": AttentionHead, "linear": LinearHead}


def create_head(
    head: str | HeadFactory,
    stage: Stage,
    teacher: Stage,
    num_classes: int,
    head_args: dict[str, Any] | None = None,
    model_name: str = "the model",
) -> nn.Module:
    """Build the head of one stage.

    Args:
        head: a name in `HEADS`, or a callable `(stage, teacher, num_classes, **head_args)` that returns a module which
            maps (B, stage.channels, H, W) to `(logits (B, num_classes), feature (B, teacher.channels, H', W'))`.
        model_name: for error messages.

    Raises:
        ValueError: the name is unknown, or a value in `head_args` does not fit.
        TypeError: `head` is neither a name nor a callable that makes a module, or does not take `head_args`.
    """
    names = ", ".join(HEADS)
    if isinstance(head, str) and head not in HEADS:
        raise ValueError(f"unknown head {head!r}; choose from {names}, or pass a callable")
    factory = HEADS[head] if isinstance(head, str) else head
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(
            f"head must be one of {names} or a callable that makes a module for each stage, got {type(head).__name__}"
        )
    where, head_args = f"head {head!r} of {model_name} at {stage}", head_args or {}
    try:
        parameters = signature(factory)
        parameters.bind(stage, teacher, num_classes, **head_args)
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        known = ", ".join(list(parameters.parameters)[3:]) if isinstance(error, TypeError) else ""
        raise TypeError(
            f"{where} does not take (stage, teacher, num_classes) and head_args={head_args}: {error};"
            f" its further arguments are {known or 'none'}"
        ) from None
    made = factory(stage, teacher, num_classes, **head_args)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{where} must be a module, but the callable returned {type(made).__name__}")
    return made


def move_alike(heads: nn.Module, backbone: nn.Module) -> None:
    """Give heads the device, dtype and memory format of a backbone."""
    like = next(p for p in backbone.parameters() if p.is_floating_point())
    heads.to(device=like.device, dtype=like.dtype)
    if any(p.ndim == 4 and _is_channels_last(p) for p in backbone.parameters()):
        heads.to(memory_format=torch.channels_last)


def check_output(
    output: Any, x: Tensor, num_classes: int, channels: int, stage: Stage, model_name: str
) -> tuple[Tensor, Tensor]:
    """The logits and the feature that a head returned for x (B, C, H, W). While torch.fx traces it there are no shapes.

    Args:
        stage: that the head stands on.
        model_name: for error messages.

    Raises:
        ValueError: they are no pair of tensors (B, num_classes) and (B, channels, H', W').
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    if len(parts) == 2 and all(isinstance(part, Proxy) for part in parts):
        return tuple(parts)
    batch = x.shape[0]
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else (type(part).__name__,) for part in parts]
    fits = len(shapes) == 2 and shapes[0] == (batch, num_classes)
    if not fits or len(shapes[1]) != 4 or shapes[1][:2] != (batch, channels):
        raise ValueError(
            f"the head of {model_name} at {stage} must return logits {(batch, num_classes)} and a feature"
            f" ({batch}, {channels}, H, W), got {shapes}; mend the callable that was given as head"
        )
    logits, feature = parts
    return logits, feature


def check_logits(model: nn.Module, logits: Any, x: Tensor, num_classes: int) -> None:
    """Raise where a backbone's own classifier does not give logits (B, K) for images x (B, C, H, W). While torch.fx
    traces it there are no shapes."""
    if isinstance(logits, Proxy):
        return
    name, shape = type(model).__name__, (x.shape[0], num_classes)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name} gives {len(logits)} logits instead of one in training mode; call its"
            " set_distilled_training(False), which gives their mean"
        )
    if logits.shape != shape:
        raise ValueError(
            f"{name} gives logits {tuple(logits.shape)}, expected {shape}; it must pool its features (global_pool), and"
            " reset_classifier is called on the wrapped model, which then renews all its classifiers"
        )


def run_pooled(
    head: nn.Module, x: Tensor, stage: Stage, num_classes: int, channels: int, model_name: str
) -> tuple[Tensor, Tensor]:
    """Logits (B, K) of a head and the average (B, D) of its feature, which `ProjectedHead`s give for less, unless a
    subclass has a `forward` of its own.

    Args:
        x: feature map (B, C, H, W) of the stage.
        stage, num_classes, channels, model_name: as of `check_output`.
    """
    own = "forward" in vars(head) or getattr(type(head), "forward", None) is not ProjectedHead.forward
    if not own:
        logits, pooled = head(x, with_feature=False)
        if isinstance(logits, Proxy) or logits.shape[1:] == (num_classes,):
            return logits, pooled
    logits, feature = check_output(head(x), x, num_classes, channels, stage, model_name)
    return logits, feature.mean((2, 3))


def run_exits(
    heads: Iterable[nn.Module],
    backbone: BackboneOutput,
    stages: Sequence[Stage],
    num_classes: int,
    channels: int,
    model_name: str,
    with_features: bool,
) -> SelfDistillOutput:
    """What every exit says.

    Args:
        backbone: that the heads are given.
        stages: of the heads.
        num_classes, channels, model_name: as of `check_output`.
        with_features: False leaves the features out.
    """
    described = (num_classes, channels, model_name)
    if not with_features:
        pooled = [run_pooled(head, x, stage, *described) for head, x, stage in zip(heads, backbone.maps, stages)]
        return SelfDistillOutput((*(logits for logits, _ in pooled), backbone.logits), ())
    shallow = [
        check_output(head(x), x, num_classes, channels, stage, model_name)
        for head, x, stage in zip(heads, backbone.maps, stages)
    ]
    teacher = backbone.maps[-1]
    return SelfDistillOutput(
        logits=(*(logits for logits, _ in shallow), backbone.logits),
        features=(*(resize_feature(feature, teacher) for _, feature in shallow), teacher),
    )


def resize_feature(feature: Tensor, teacher: Tensor) -> Tensor:
    """A head's feature at the teacher's height and width, also where the sizes do not divide."""
    if feature.shape[2:] == teacher.shape[2:]:
        return feature
    return F.adaptive_avg_pool2d(feature, (teacher.shape[2], teacher.shape[3]))


def _stride(stage: Stage, teacher: Stage) -> int:
    """Pixels of the stage's map, along one side, for each of the teacher's."""
    return max(1, round(teacher.reduction / stage.reduction))


def _init_weights(module: nn.Module) -> None:
    """As timm initialises convolutional networks: He's normal distribution over the outputs of each group."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _is_channels_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
