"""Mixup, CutMix and label smoothing, for any task: they make soft labels; and several views of an image."""
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import JsdCrossEntropy
from timm.task import TrainingTask
from torch import Tensor

from .config import TrainConfig
from .labels import check_targets


class TargetMixer:
    """Applies timm's Mixup and label smoothing to a batch, or nothing.

    Args:
        num_classes: K.
        smooths: False leaves the labels to a loss that smooths them itself.
    """

    def __init__(self, config: TrainConfig, num_classes: int, smooths: bool = True):
        self.config, self.num_classes = config, num_classes
        self.smoothing = config.smoothing if smooths else 0.0
        self.mixup = Mixup(
            config.mixup, config.cutmix, cutmix_minmax=config.cutmix_minmax, prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob, mode=config.mixup_mode, label_smoothing=config.smoothing,
            num_classes=num_classes,
        ) if config.mixup or config.cutmix or config.cutmix_minmax else None

    def check(self, y: Any) -> Tensor:
        """The labels of a batch, see `check_targets`; without labels as they are."""
        return y if self.config.unlabelled else check_targets(y, self.num_classes, self.mixes)

    @property
    def mixes(self) -> bool:
        """Whether soft labels are made."""
        return self.mixup is not None or bool(self.smoothing)

    def __call__(self, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Images (B, C, H, W) and class indices (B,) to images and labels, soft (B, K) where anything is on; without
        labels to images and None."""
        off = self.config.mixup_off_epoch
        mixing = self.mixup is not None and not (off and epoch >= off)
        if self.config.unlabelled:
            return (self.mixup(x, torch.zeros_like(y))[0] if mixing else x), None
        if mixing:
            return self.mixup(x, y)
        if self.mixes:
            return x, mixup_target(y, self.num_classes, smoothing=self.smoothing).to(torch.float32)
        return x, y


def smooths_labels(task: TrainingTask) -> bool:
    """Whether the loss of a task takes class indices and smooths them itself."""
    criterion = getattr(task, "criterion", None)
    return isinstance(getattr(criterion, "label_loss", criterion), JsdCrossEntropy)


def view_by_view(x: Any, y: Any) -> tuple[Any, Any]:
    """A batch of S views of each image, (B, S, C, H, W), as (S * B, C, H, W): first one view of all images, then the
    next, as timm's losses and batch norms of augmentation splits have them; the labels (B, ...) likewise. Any other
    batch stays as it is."""
    if not (isinstance(x, Tensor) and x.ndim == 5):
        return x, y
    return x.transpose(0, 1).flatten(0, 1), torch.cat([y] * x.shape[1])
