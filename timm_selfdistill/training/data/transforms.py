"""Preprocessing and augmentation of images, and mixing of batches."""

from collections.abc import Callable
from copy import copy
from typing import Any, TypeAlias

import torch
from PIL import Image
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, str_to_interp_mode
from timm.loss import JsdCrossEntropy
from timm.task import TrainingTask
from torch import Tensor, nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, Compose, Normalize, RandomCrop, Resize

from ...cost import default_input_size
from ...model import SelfDistillModel
from ...timm_model import as_timm
from ..config import TrainConfig
from .labels import check_targets

Transform: TypeAlias = Callable[[Image.Image], Tensor]


def takes_other_sizes(backbone: nn.Module) -> bool:
    """Whether a timm model can change the image size it was created with."""
    return not as_timm(backbone).pretrained_cfg.get("fixed_input_size") or hasattr(backbone, "set_input_size")


def own_class_names(backbone: nn.Module) -> list[str] | None:
    """Return the class names that came with a timm model's weights; None if there are none, or its classifier is new.

    Examples:
        >>> import timm
        >>> from timm_selfdistill import model_data_config
        >>> from timm_selfdistill.training import own_class_names
        >>> backbone = timm.create_model("test_resnet", num_classes=2)
        >>> own_class_names(backbone) is None
        True
        >>> config = model_data_config(backbone, class_names=["cat", "dog"])
        >>> own_class_names(backbone)
        ['cat', 'dog']
    """
    model = as_timm(backbone)
    names = model.pretrained_cfg.get("label_names")
    return list(names) if names and len(names) == model.num_classes else None


def model_data_config(
    backbone: nn.Module,
    img_size: int | None = None,
    in_chans: int | None = None,
    class_names: list[str] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Return the preprocessing of a timm model, with changes for a run.

    The result and the class names are written back to `backbone.pretrained_cfg`, so that
    `timm.data.resolve_model_data_config(backbone)` returns the same, even after saving and loading. A model with a
    fixed image size is changed to `img_size` by its own `set_input_size`.

    Args:
        img_size: image size in pixels; None is the model's own.
        in_chans: number of channels; None is the model's own.
        class_names: class names in the order of the indices; None leaves those of the model.
        overrides: mean, std, interpolation, crop_pct; None is the model's own value.

    Raises:
        ValueError: the model's image size cannot be changed, or a value does not fit.

    Examples:
        >>> import timm
        >>> from timm_selfdistill import model_data_config
        >>> backbone = timm.create_model("resnet18", num_classes=2)
        >>> config = model_data_config(backbone, img_size=96, class_names=["cat", "dog"])
        >>> config["input_size"], config["interpolation"]
        ((3, 96, 96), 'bicubic')
        >>> backbone.pretrained_cfg["label_names"]
        ['cat', 'dog']
    """
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size must be at least 1 pixel, got {img_size}")
    if overrides.get("crop_pct") is not None and not 0 < overrides["crop_pct"] <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], got {overrides['crop_pct']}")
    model, config = as_timm(backbone), resolve_model_data_config(backbone)
    size = (img_size, img_size) if img_size else tuple(config["input_size"][1:])
    if size != tuple(config["input_size"][1:]) and model.pretrained_cfg.get("fixed_input_size"):
        if not takes_other_sizes(backbone):
            raise ValueError(
                f"{type(backbone).__name__} only takes images of {config['input_size'][1:]} pixels, not {size}"
            )
        model.set_input_size(img_size=size)
    in_chans = default_input_size(backbone)[0] if in_chans is None else in_chans
    config["input_size"] = (in_chans, *size)
    config.update({key: value for key, value in overrides.items() if value is not None})
    for key in ("mean", "std"):
        values = tuple(config[key])
        if overrides.get(key) is not None and len(values) not in (1, in_chans):
            raise ValueError(f"{key} must have 1 or {in_chans} values, one per channel, got {len(values)}: {values}")
        if len(values) != in_chans:
            config[key] = (sum(values) / len(values),) * in_chans
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    model.pretrained_cfg.update({key: config[key] for key in kept if key in config}, test_input_size=None)
    if img_size is not None and isinstance(backbone, SelfDistillModel):
        backbone.set_input_size(img_size=size)
    if class_names is not None:
        model.pretrained_cfg.update(label_names=list(class_names), num_classes=len(class_names))
    return config


CROP_MODES = ("rrc", "rkrc", "rkrr", "pad")
GREY = 128


class Cutout(nn.Module):
    """Sets a square of an image (C, H, W) to zero. Its center may lie anywhere in the image, so that a border often
    cuts it off (arXiv:1708.04552).

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
    """Returns several views of an image, (S, C, H, W): the first is clean, the others are augmented, as in
    `timm.data.AugMixDataset` (arXiv:1912.02781).

    Args:
        crop, augment, to_tensor: the three steps of timm's transform; all views share the crop.
        splits: S.
        erases_first: whether random erasing also applies to the first view.
    """

    def __init__(self, crop: Compose, augment: Compose, to_tensor: Compose, splits: int, erases_first: bool):
        self.crop, self.augment, self.to_tensor, self.splits = crop, augment, to_tensor, splits
        self.clean = Compose(
            [step for step in to_tensor.transforms if erases_first or not isinstance(step, RandomErasing)]
        )

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
) -> Transform:
    """Create the training transform: PIL image to augmented, normalized tensor (C, H, W), or (S, C, H, W) with
    `aug_splits`.

    Args:
        data_config: as returned by `timm.data.resolve_model_data_config`.
        no_aug: only resize and normalize.
        train_crop_mode: timm's "rrc", "rkrc" or "rkrr"; "pad" resizes the image to the image size if necessary, pads
            each side with gray by an eighth of it (4 pixels for 32), and takes a random crop.
        auto_augment: one of timm's policies, or "cifar10", the policy found by AutoAugment on CIFAR-10
            (arXiv:1805.09501).
        cutout: side in pixels, see `Cutout`; 0 is off.
        aug_splits: S, see `AugmentationSplits`; 0 is off.
        resplit: do not apply random erasing to the first view.
        augmentation: further arguments of `timm.data.create_transform`.

    Raises:
        ValueError: `train_crop_mode`, `cutout` or `aug_splits` is invalid.
        AssertionError, KeyError: timm does not know a setting.
    """
    _check_augmentation(no_aug, train_crop_mode, cutout, aug_splits)
    if no_aug:
        return normalizing_in_place(create_transform(**data_config, is_training=True, no_aug=True))
    pad, cifar_policy = train_crop_mode == "pad", auto_augment == "cifar10"
    if cifar_policy:
        auto_augment, augmentation = None, {**augmentation, "color_jitter": None}
    crop, augment, to_tensor = create_transform(
        **data_config,
        is_training=True,
        train_crop_mode=None if pad else train_crop_mode,
        auto_augment=auto_augment,
        separate=True,
        **augmentation,
    )
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


def _check_augmentation(no_aug: bool, train_crop_mode: str, cutout: int, aug_splits: int) -> None:
    if train_crop_mode not in CROP_MODES:
        raise ValueError(f"train_crop_mode must be one of {', '.join(CROP_MODES)}, got {train_crop_mode!r}")
    if isinstance(cutout, bool) or not isinstance(cutout, int) or cutout < 0:
        raise ValueError(f"cutout must be a whole number of pixels >= 0, got {cutout!r}")
    if aug_splits == 1 or aug_splits < 0 or (aug_splits and no_aug):
        raise ValueError(
            f"aug_splits must be 0 (off), or at least 2 with augmentation, got {aug_splits}"
            + (" without augmentation" if no_aug else "")
        )


def normalizing_in_place(transform: Compose) -> Compose:
    """Make a transform normalize tensors in place, without copying them; nothing else uses them."""
    for step in transform.transforms:
        if isinstance(step, Normalize):
            step.inplace = True
    return transform


class TargetMixer:
    """Applies timm's Mixup and label smoothing to batches, as far as they are on.

    Args:
        num_classes: K.
        smooths: whether to smooth labels; False if the loss does so itself.
    """

    def __init__(self, config: TrainConfig, num_classes: int, smooths: bool = True):
        self.config, self.num_classes = config, num_classes
        self.smoothing = config.smoothing if smooths else 0.0
        self.mixup: Mixup | None = (
            Mixup(
                config.mixup,
                config.cutmix,
                cutmix_minmax=config.cutmix_minmax,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                mode=config.mixup_mode,
                label_smoothing=config.smoothing,
                num_classes=num_classes,
            )
            if config.mixup or config.cutmix or config.cutmix_minmax
            else None
        )

    def check(self, y: Any) -> Tensor:
        """Return the labels of a batch as `check_targets` does; unchanged when training without labels."""
        return y if self.config.unlabelled else check_targets(y, self.num_classes, self.mixes)

    @property
    def mixes(self) -> bool:
        """Whether the labels become soft labels."""
        return self.mixup is not None or bool(self.smoothing)

    def _mixup_of(self, epoch: int) -> Mixup | None:
        off = self.config.mixup_off_epoch
        return None if off and epoch >= off else self.mixup

    def __call__(self, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Return images and labels for images (B, C, H, W) and class indices (B,). The labels are soft (B, K) if mixup,
        CutMix or smoothing is on, and None when training without labels."""
        mixup = self._mixup_of(epoch)
        if self.config.unlabelled:
            return (x if mixup is None else mixup(x, torch.zeros_like(y))[0]), None
        if mixup is not None:
            return mixup(x, y)
        if self.mixes:
            return x, mixup_target(y, self.num_classes, smoothing=self.smoothing).to(torch.float32)
        return x, y

    def mix(self, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return images and labels as `__call__` does, and the weight of each image in its mixture (B,): 1 if it is not
        mixed. The other part is image B - 1 - i, which timm mixes with image i."""
        mixup = self._mixup_of(epoch)
        if mixup is None:
            return *self(x, y, epoch), torch.ones(len(y), device=y.device)
        paired = copy(mixup)  # timm returns the weights only through labels, so each image gets its own class
        paired.num_classes, paired.label_smoothing = len(y), 0.0
        x, weights = paired(x, torch.arange(len(y), device=y.device))
        weight = weights.diagonal()
        return x, mixup_target(y, self.num_classes, weight[:, None], mixup.label_smoothing), weight


def smooths_labels(task: TrainingTask) -> bool:
    """Whether the loss of a task smooths class indices itself."""
    criterion = getattr(task, "criterion", None)
    return isinstance(getattr(criterion, "label_loss", criterion), JsdCrossEntropy)


def view_by_view(x: Any, y: Any) -> tuple[Any, Any]:
    """Reshape S views of each image, (B, S, C, H, W), to (S * B, C, H, W), with the first view of all images first, as
    timm's losses and batch norms for augmentation splits expect; the labels (B, ...) are repeated accordingly. Other
    batches are returned unchanged."""
    if not (isinstance(x, Tensor) and x.ndim == 5):
        return x, y
    return x.transpose(0, 1).flatten(0, 1), torch.cat([y] * x.shape[1])
