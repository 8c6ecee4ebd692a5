"""Images and labels, checked before they go into a model."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model import SelfDistillModel
from ..stages import explain_misfit
from ..timm_model import as_timm
from ..truncated import TruncatedModel


def check_images(model: nn.Module, x: Tensor, known_size: bool = False) -> None:
    """Raise ValueError for images that a model cannot take.

    Args:
        model: self-distilled, truncated, or a plain timm model.
        known_size: it has taken such a shape before.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"expected images as a tensor (B, C, H, W), got {type(x).__name__}")
    backbone = model
    model_args: dict[str, Any] | None = None
    if isinstance(model, (SelfDistillModel, TruncatedModel)):
        backbone, model_args = model.backbone, model.model_args
    if not known_size and (misfit := explain_misfit(backbone, x, model_args)):
        raise ValueError(misfit)
    like = next(p for p in model.parameters() if p.is_floating_point())
    if x.device != like.device or (x.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type)):
        raise ValueError(
            f"the images are {x.dtype} on {x.device}, the model's weights {like.dtype} on {like.device};"
            " convert the images with x.to(...)"
        )


def labelled_batches(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a loader: images (B, C, H, W) on the model's device, and class indices (B,), int64, where they were.

    Batches without an image are passed over.

    Args:
        model: a self-distilled or a plain timm model.

    Raises:
        ValueError: the loader gives nothing, no batches of images and labels, images that the model cannot take, or
            labels out of range.
    """
    device = next(p for p in model.parameters() if p.is_floating_point()).device
    empty = True
    for batch in loader:
        _check_batch(batch, as_timm(model).num_classes)
        if len(batch[0]):
            x = batch[0].to(device)
            check_images(model, x)
            empty = False
            yield x, batch[1].long()
    if empty:
        raise ValueError("the loader gives no images that can be read")


def all_finite(logits: Sequence[Tensor]) -> bool:
    """Whether all logits are finite numbers; waits for a GPU once."""
    return bool(torch.stack([part.isfinite().all() for part in logits]).all())


def check_finite(logits: Sequence[Tensor]) -> None:
    """Raise ValueError unless all logits are finite numbers."""
    if not all_finite(logits):
        raise ValueError("the model gives logits that are no finite numbers; its weights or the images are damaged")


def _check_batch(batch: Any, classes: int) -> None:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise ValueError("the loader must give batches of (images (B, C, H, W), class indices (B,))")
    x, y = batch
    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool or len(y) != len(x):
        raise ValueError(f"labels must be class indices (B,), got {y.dtype} {tuple(y.shape)}")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        unlabelled = "; -1 stands for an image without a label, leave those out" if int(y.min()) == -1 else ""
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}{unlabelled}")
