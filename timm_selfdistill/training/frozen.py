"""Runs in which the backbone is frozen: its heads alone learn, are averaged and kept in checkpoints."""
import hashlib
import warnings

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..loss import SelfDistillLoss
from ..model import SelfDistillModel
from ..task import SelfDistillTask
from .config import TrainConfig
from .sampling import Draw, TrainImages
from .stream import StreamedImages

READS = 4
"""Of one image, to see whether it is the same every time."""


def is_frozen(model: nn.Module) -> bool:
    return isinstance(model, SelfDistillModel) and model.freeze_backbone


def trained_part(model: nn.Module) -> nn.Module:
    """The heads of a model with a frozen backbone, or else the whole model."""
    return model.heads if is_frozen(model) else model


def trained_state(task: TrainingTask) -> dict[str, Tensor]:
    """The state of a task, without a frozen backbone's."""
    state, model = task.state_dict(), task.get_trainable_module()
    if not is_frozen(model):
        return state
    frozen = tuple(f"{name}." for name, part in task.named_modules() if part is model.backbone)
    return {key: value for key, value in state.items() if not key.startswith(frozen)}


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 of a frozen backbone, which a checkpoint holds in its place; "" where nothing is frozen."""
    if not is_frozen(model):
        return ""
    digest = hashlib.sha256()
    for key, value in model.backbone.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def learns_in_parts(task: TrainingTask, config: TrainConfig) -> bool:
    """Whether parameters that learn at some time have no gradients at another, or never: classifiers learn alone first,
    or without labels and alpha only features do."""
    return config.head_warmup_epochs > 0 or (config.unlabelled and not task.criterion.alpha)


def check_frozen_settings(task: TrainingTask, config: TrainConfig, train_data: Dataset) -> None:
    """Raise ValueError where settings need a frozen backbone and there is none, or leave nothing to learn from."""
    frozen = is_frozen(task.get_trainable_module())
    for name, reason in (("unlabelled", "which alone can teach without labels"),
                         ("cache_features", "which alone says the same of an image in every epoch")):
        if getattr(config, name) and not frozen:
            raise ValueError(
                f"{name} (--{name.replace('_', '-')}) needs a model with a frozen backbone, {reason};"
                " wrap_self_distill(model, freeze_backbone=True) makes one (--freeze-backbone)")
    if config.cache_features and isinstance(train_data, StreamedImages):
        raise ValueError("cache_features keeps what the backbone says of each image of a data set, which a stream is"
                         " not; leave out streaming or cache_features")
    if config.cache_features:
        _check_unchanging(train_data)
    if config.unlabelled:
        if not isinstance(task, SelfDistillTask):
            raise TypeError(f"unlabelled (--unlabelled) needs a SelfDistillTask, whose exits learn from the deepest;"
                            f" {type(task).__name__} learns from labels")
        _check_teaching(task.criterion)


def _check_teaching(loss: SelfDistillLoss) -> None:
    if loss.alpha:
        return
    if not loss.beta or loss.hint is None:
        raise ValueError("without labels alpha=0 and no hint leave nothing to learn from; give alpha, beta or hint")
    warnings.warn("with alpha=0 and no labels only the features of the exits learn, their classifiers stay as they are",
                  stacklevel=2)


def _check_unchanging(data: Dataset) -> None:
    """Raise ValueError for images that are augmented: not the same each time that they are read."""
    images = [TrainImages(data, "raise")[Draw(seed, 0)][0] for seed in range(READS)]
    if not all(torch.equal(image, images[0]) for image in images):
        raise ValueError("cache_features keeps what the backbone says of each image, but the training images are"
                         " augmented: not the same each time that they are read; make them with no_aug=True (--no-aug)")
