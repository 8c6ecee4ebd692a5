"""Mixup, CutMix and label smoothing, for any task: they make soft labels."""
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from .config import TrainConfig
from .labels import check_targets


class TargetMixer:
    """Applies timm's Mixup and label smoothing to a batch, or nothing.

    Args:
        num_classes: K.
    """

    def __init__(self, config: TrainConfig, num_classes: int):
        self.config, self.num_classes = config, num_classes
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
        return self.mixup is not None or bool(self.config.smoothing)

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
            return x, mixup_target(y, self.num_classes, smoothing=self.config.smoothing).to(torch.float32)
        return x, y
