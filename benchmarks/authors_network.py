"""The network of the authors' code, rewritten from its description: a CIFAR ResNet whose shallow classifiers are
attention masks and separable convolutions at full width. For comparison only; the library does not use it.
"""

import timm
import torch.nn.functional as F
from timm.task import TrainingTask
from torch import Tensor, nn

from timm_selfdistill import SelfDistillLoss
from timm_selfdistill.model import SelfDistillOutput


def separable(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two depthwise separable 3x3 convolutions, the first of stride 2."""

    def half(first: int, last: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(first, first, 3, stride, 1, groups=first, bias=False),
            nn.Conv2d(first, last, 1, bias=False),
            nn.BatchNorm2d(last),
            nn.ReLU(),
        ]

    return nn.Sequential(*half(in_channels, in_channels, 2), *half(in_channels, out_channels, 1))


class AuthorsNetwork(nn.Module):
    """Images (B, 3, 32, 32) to what four classifiers say.

    Args:
        name: of a CIFAR ResNet in timm's registry.
    """

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=num_classes)
        channels = [level["num_chs"] for level in self.backbone.feature_info][-4:]
        self.attention = nn.ModuleList(
            nn.Sequential(
                separable(chs, chs), nn.BatchNorm2d(chs), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Sigmoid()
            )
            for chs in channels[:3]
        )
        self.scala = nn.ModuleList(
            nn.Sequential(*(separable(channels[k], channels[k + 1]) for k in range(level, 3))) for level in range(3)
        )
        self.fc = nn.ModuleList(nn.Linear(channels[-1], num_classes) for _ in range(3))

    def forward(self, x: Tensor) -> SelfDistillOutput:
        count = len(self.backbone.feature_info)
        final, maps = self.backbone.forward_intermediates(x, indices=list(range(count - 4, count)))
        features = [scala(attention(part) * part) for part, attention, scala in zip(maps, self.attention, self.scala)]
        logits = [fc(F.adaptive_avg_pool2d(part, 1).flatten(1)) for part, fc in zip(features, self.fc)]
        return SelfDistillOutput((*logits, self.backbone.forward_head(final)), (*features, maps[-1]))


class AuthorsTask(TrainingTask):
    """Its network under our loss, which has the same terms."""

    def __init__(self, name: str, num_classes: int):
        super().__init__(verbose=False)
        self.trainable_module = AuthorsNetwork(name, num_classes)
        self.criterion = SelfDistillLoss.paper()

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        output = self.trainable_module(x)
        return {"loss": self.criterion(output, target), "output": output.logits[-1]}
