"""The networks of a training task: what learns, what is evaluated and saved, what stays as it is (a frozen backbone,
or a teacher).

timm's own methods may answer None, for a task without a moving average; here that is an error.
"""

import hashlib
from typing import Any, TypeGuard

import torch
from timm.task import TrainingTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from ...model import SelfDistillModel


def check_task(task: Any) -> None:
    """Raise unless this can be trained.

    Raises:
        TypeError: it is no TrainingTask.
        ValueError: its weights hold NaN or infinity.
    """
    if not isinstance(task, TrainingTask):
        raise TypeError(f"expected a timm.task.TrainingTask such as SelfDistillTask, got {type(task).__name__}")
    spoilt = [
        name
        for name, value in trainable_model(task).state_dict().items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if spoilt:
        raise ValueError(
            f"the model's weights are not finite before the first update: {spoilt[0]} first; they come"
            " from a run that diverged or a damaged file, take others"
        )


def trainable_model(task: TrainingTask) -> nn.Module:
    """What learns; two networks where a task trains both.

    Raises:
        TypeError: the task has none.
    """
    return _known(task, task.get_trainable_module())


def eval_model(task: TrainingTask, average: bool = False) -> nn.Module:
    """What is evaluated and saved: one network, or its moving average.

    Raises:
        TypeError: the task has none.
    """
    return _known(task, task.get_eval_model(ema=average))


def self_distill_model(task: TrainingTask) -> SelfDistillModel:
    """What learns in a task that is known to be of one with exits.

    Raises:
        TypeError: it has none.
    """
    model = trainable_model(task)
    if not isinstance(model, SelfDistillModel):
        raise TypeError(f"expected a task with a SelfDistillModel, got one with {type(model).__name__}")
    return model


def _known(task: TrainingTask, model: nn.Module | None) -> nn.Module:
    if model is None:
        raise TypeError(f"{type(task).__name__} has no network")
    return model


def is_frozen(model: nn.Module | None) -> TypeGuard[SelfDistillModel]:
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
        raise ValueError(
            f"the teacher's weights are not finite, {spoilt[0]} first; they come from a run that diverged"
            " or a damaged file, take another teacher"
        )


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


def _teacher(task: TrainingTask) -> DistillationTeacher | None:
    teacher = getattr(task, "teacher", None)
    return teacher if isinstance(teacher, DistillationTeacher) else None
