"""Training transforms: timm's, and the three of the CIFAR recipe that timm does not have."""
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, str_to_interp_mode
from torch import Tensor, nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, Compose, Normalize, RandomCrop, Resize

CROP_MODES = ("rrc", "rkrc", "rkrr", "pad")
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


class AugmentationSplits:
    """Several views of an image, (S, C, H, W): the first as it is, the others augmented, as those of
    `timm.data.AugMixDataset` (arXiv:1912.02781).

    Args:
        crop, augment, to_tensor: the three steps of timm's transform; the views share the first.
        splits: S.
        erases_first: whether random erasing takes the first view, too.
    """

    def __init__(self, crop: Compose, augment: Compose, to_tensor: Compose, splits: int, erases_first: bool):
        self.crop, self.augment, self.to_tensor, self.splits = crop, augment, to_tensor, splits
        self.clean = Compose([step for step in to_tensor.transforms
                              if erases_first or not isinstance(step, RandomErasing)])

    def __call__(self, image: Image.Image) -> Tensor:
        image = self.crop(image)
        views = [self.clean(image)]
        views += [self.to_tensor(self.augment(image)) for _ in range(self.splits - 1)]
        return torch.stack(views)


def create_train_transform(
        data_config: dict[str, Any],
        *,
        no_aug: bool = False,
        train_crop_mode: str = "rrc",
        auto_augment: str | None = None,
        cutout: int = 0,
        aug_splits: int = 0,
        resplit: bool = False,
        **augmentation: Any,
) -> Callable[[Image.Image], Tensor]:
    """PIL image -> augmented tensor (C, H, W), normalised; with aug_splits several of it, (S, C, H, W).

    Args:
        data_config: as `timm.data.resolve_model_data_config` gives it.
        no_aug: resize and normalise only.
        train_crop_mode: timm's "rrc", "rkrc" and "rkrr"; "pad" resizes an image to the image size if it has another,
            pads an eighth of it (4 pixels of 32) with grey on each side, and crops anywhere.
        auto_augment: timm's policies, or "cifar10", the policy that AutoAugment found on CIFAR-10 (arXiv:1805.09501).
        cutout: side in pixels, see `Cutout`; 0 is off.
        aug_splits: S, see `AugmentationSplits`; 0 is off. resplit: no random erasing in the first of them.
        augmentation: further arguments of `timm.data.create_transform`.

    Raises:
        ValueError: `train_crop_mode`, `cutout` or `aug_splits` is none of these.
        AssertionError, KeyError: timm does not know a setting.
    """
    if train_crop_mode not in CROP_MODES:
        raise ValueError(f"train_crop_mode must be one of {', '.join(CROP_MODES)}, got {train_crop_mode!r}")
    if isinstance(cutout, bool) or not isinstance(cutout, int) or cutout < 0:
        raise ValueError(f"cutout must be a number of pixels, at least 0, got {cutout!r}")
    if aug_splits == 1 or aug_splits < 0 or (aug_splits and no_aug):
        raise ValueError(f"aug_splits must be 0 (off), or at least 2 with augmentation, got {aug_splits}"
                         + (" without augmentation" if no_aug else ""))
    if no_aug:
        return normalizing_in_place(create_transform(**data_config, is_training=True, no_aug=True))
    pad, cifar_policy = train_crop_mode == "pad", auto_augment == "cifar10"
    if cifar_policy:
        auto_augment, augmentation = None, {**augmentation, "color_jitter": None}
    crop, augment, to_tensor = create_transform(
        **data_config, is_training=True, train_crop_mode=None if pad else train_crop_mode, auto_augment=auto_augment,
        separate=True, **augmentation)
    channels, *size = data_config["input_size"]
    if cutout:
        tensor = next(i for i, step in enumerate(to_tensor.transforms) if isinstance(step, MaybeToTensor))
        to_tensor.transforms.insert(tensor + 1, Cutout(cutout))
    if cifar_policy:
        augment.transforms.append(AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[GREY] * channels))
    if pad:
        interpolation = data_config["interpolation"]
        mode = str_to_interp_mode("bilinear" if interpolation == "random" else interpolation)
        crop.transforms[:1] = [Resize(size, mode), RandomCrop(size, padding=(size[1] // 8, size[0] // 8), fill=GREY)]
    normalizing_in_place(to_tensor)
    if aug_splits:
        return AugmentationSplits(crop, augment, to_tensor, aug_splits, erases_first=not resplit)
    return Compose([*crop.transforms, *augment.transforms, *to_tensor.transforms])


def normalizing_in_place(transform: Compose) -> Compose:
    """The same, without a copy of each tensor, which nobody else holds."""
    for step in transform.transforms:
        if isinstance(step, Normalize):
            step.inplace = True
    return transform
