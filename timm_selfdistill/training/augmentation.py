"""Training transforms: timm's, and the three of the CIFAR recipe that timm does not have."""
from typing import Any

import torch
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torch import Tensor, nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, Compose, RandomCrop

GREY = 128


class Cutout(nn.Module):
    """Sets a square of an image (C, H, W) to zero; its centre lies anywhere in the image, so that it is often cut off
    by a border (arXiv:1708.04552).

    Args:
        length: side in pixels.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, image: Tensor) -> Tensor:
        image = image.clone()
        rows, columns = (self._span(size) for size in image.shape[-2:])
        image[..., rows, columns] = 0
        return image

    def _span(self, size: int) -> slice:
        start = int(torch.randint(size, ())) - self.length // 2
        return slice(max(start, 0), max(start + self.length, 0))


def create_train_transform(
        data_config: dict[str, Any],
        *,
        train_crop_mode: str = "rrc",
        auto_augment: str | None = None,
        cutout: int = 0,
        **augmentation: Any,
) -> Compose:
    """PIL image -> augmented tensor (C, H, W), normalised.

    Args:
        data_config: as `timm.data.resolve_model_data_config` gives it.
        train_crop_mode: timm's "rrc", "rkrc" and "rkrr"; "pad" pads an eighth of the image size (4 pixels of 32) with
            grey on each side and crops anywhere, without resizing.
        auto_augment: timm's policies, or "cifar10", the policy that AutoAugment found on CIFAR-10 (arXiv:1805.09501).
        cutout: side in pixels, see `Cutout`; 0 is off.
        augmentation: further arguments of `timm.data.create_transform`.

    Raises:
        ValueError: `cutout` is negative.
        AssertionError, KeyError: timm does not know a setting.
    """
    if cutout < 0:
        raise ValueError(f"cutout must be at least 0 pixels, got {cutout}")
    cifar_policy = auto_augment == "cifar10"
    if cifar_policy:
        auto_augment, augmentation = None, {**augmentation, "color_jitter": None}
    timm_crop = None if train_crop_mode == "pad" else train_crop_mode
    transform = create_transform(
        **data_config, is_training=True, train_crop_mode=timm_crop, auto_augment=auto_augment, **augmentation)
    steps = transform.transforms
    if train_crop_mode == "pad":
        size = data_config["input_size"][-2:]
        steps[0] = RandomCrop(size, padding=(size[1] // 8, size[0] // 8), fill=GREY)
    to_tensor = next(index for index, step in enumerate(steps) if isinstance(step, MaybeToTensor))
    if cutout:
        steps.insert(to_tensor + 1, Cutout(cutout))
    if cifar_policy:
        steps.insert(to_tensor, AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[GREY] * data_config["input_size"][0]))
    return transform
