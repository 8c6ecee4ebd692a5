"""Runs in which a network is frozen: the backbone, whose heads alone learn, are averaged and kept in checkpoints, or a
teacher beside the student."""
import hashlib
import warnings

import torch
from timm.task import TrainingTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ..model import SelfDistillModel
from ..task import SelfDistillTask
from .config import TrainConfig
from .labels import is_labelled
from .sampling import Draw, TrainImages

IMAGES_READ = 16
"""Twice, to see whether they are the same."""


def is_frozen(model: nn.Module) -> bool:
    return isinstance(model, SelfDistillModel) and model.freeze_backbone


def trained_part(model: nn.Module) -> nn.Module:
    """The heads of a model with a frozen backbone, or else the whole model."""
    return model.heads if is_frozen(model) else model


def frozen_part(task: TrainingTask) -> nn.Module | None:
    """The network that stays as it is: a frozen backbone, or the teacher of one of timm's distillation tasks, ours
    included. What else a task may call its teacher perhaps learns."""
    model = task.get_trainable_module()
    return model.backbone if is_frozen(model) else _teacher(task)


def freeze_teacher(task: TrainingTask) -> None:
    """Freeze the teacher of timm's distillation tasks, which timm does only where it distributes them itself: else
    DistributedDataParallel would wait for its gradients.

    Raises:
        ValueError: its weights hold NaN or infinity.
    """
    teacher = _teacher(task)
    if teacher is None:
        return
    teacher.requires_grad_(False)
    spoilt = [name for name, value in teacher.model.state_dict().items() if not bool(value.isfinite().all())]
    if spoilt:
        raise ValueError(f"the teacher's weights are not finite, {spoilt[0]} first; they come from a run that diverged"
                         " or a damaged file, take another teacher")


def trained_state(task: TrainingTask) -> dict[str, Tensor]:
    """The state of a task, without that of its frozen network."""
    state, network = task.state_dict(), frozen_part(task)
    if network is None:
        return state
    frozen = tuple(f"{name}." for name, part in task.named_modules() if part is network)
    return {key: value for key, value in state.items() if not key.startswith(frozen)}


def frozen_digest(task: TrainingTask) -> str:
    """SHA-256 of the frozen network, which a checkpoint holds in its place; "" where nothing is frozen."""
    network = frozen_part(task)
    if network is None:
        return ""
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def learns_in_parts(task: TrainingTask, config: TrainConfig) -> bool:
    """Whether parameters that learn at some time have no gradients at another, or never: classifiers learn alone first,
    or without labels and alpha only features do."""
    return config.head_warmup_epochs > 0 or (config.unlabelled and not task.criterion.alpha)


def check_frozen_settings(task: TrainingTask, config: TrainConfig, train_data: Dataset, val_data: Dataset) -> None:
    """Raise where settings need a frozen backbone and there is none, or leave nothing to learn, or to learn from.

    Raises:
        ValueError, TypeError: it is so.
    """
    model = task.get_trainable_module()
    for name, reason in (("unlabelled", "which alone can teach without labels"),
                         ("cache_features", "whose features of an image alone are the same in every epoch")):
        if getattr(config, name) and not is_frozen(model):
            raise ValueError(
                f"{name} (--{name.replace('_', '-')}) needs a model with a frozen backbone, {reason};"
                " wrap_self_distill(model, freeze_backbone=True) makes one (--freeze-backbone)")
    if is_frozen(model) and not config.head_lr_scale:
        raise ValueError("the backbone is frozen and head_lr_scale is 0: nothing would learn; leave one of them out")
    if config.cache_features:
        _check_unchanging(train_data, val_data)
    if config.unlabelled:
        _check_teaching(task)
    elif not is_labelled(train_data):
        raise ValueError("the training images have no labels; give unlabelled=True (--unlabelled), which needs a model"
                         " with a frozen backbone, or images with labels")


def _teacher(task: TrainingTask) -> DistillationTeacher | None:
    teacher = getattr(task, "teacher", None)
    return teacher if isinstance(teacher, DistillationTeacher) else None


def _check_teaching(task: TrainingTask) -> None:
    if not isinstance(task, SelfDistillTask):
        raise TypeError(f"unlabelled (--unlabelled) needs a SelfDistillTask, whose exits learn from the deepest;"
                        f" {type(task).__name__} learns from labels")
    loss = task.criterion
    if loss.teacher != "deepest":
        raise ValueError(f'teacher {loss.teacher!r} learns itself, from labels; unlabelled needs the teacher "deepest"')
    if not loss.alpha and (not loss.beta or loss.hint is None):
        raise ValueError("without labels alpha=0 and no hint leave nothing to learn from; give alpha, beta or hint")
    if not loss.alpha:
        warnings.warn("with alpha=0 and no labels only the features of the exits learn, their classifiers stay as they"
                      " are", stacklevel=2)


def _check_unchanging(train_data: Dataset, val_data: Dataset) -> None:
    """Raise ValueError for images whose features cannot be kept: of a stream, or augmented, as the data set tells or
    some of its images show."""
    if any(isinstance(data, IterableDataset) for data in (train_data, val_data)):
        raise ValueError("cache_features keeps the features of each image of a data set, which a stream is not; leave"
                         " out streaming or cache_features")
    augmented = getattr(train_data, "augmented", None)
    if augmented is None:
        step = -(-len(train_data) // IMAGES_READ)
        augmented = not all(
            torch.equal(*(TrainImages(train_data, "raise")[Draw(seed, index)][0] for seed in range(2)))
            for index in range(0, len(train_data), step))
    if augmented:
        raise ValueError("cache_features keeps the features of each image, but the training images are augmented: not"
                         " the same each time that they are read; make them with no_aug=True (--no-aug)")
