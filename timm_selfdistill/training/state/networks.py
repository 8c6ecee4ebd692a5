"""The networks of a training task: what learns, what is evaluated and saved, and what is frozen, a backbone or a
teacher.

timm's own methods may answer None, for a task without a moving average; here that is an error.
"""

import hashlib
from typing import Any

import torch
from timm.task import TrainingTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from ...task import FrozenBackboneTask


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
        for module in dict.fromkeys([eval_model(task), trainable_model(task)])
        for name, value in module.state_dict().items()
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


def _known(task: TrainingTask, model: nn.Module | None) -> nn.Module:
    if model is None:
        raise TypeError(f"{type(task).__name__} has no network")
    return model


def frozen_network(task: TrainingTask) -> nn.Module | None:
    """The backbone of a `FrozenBackboneTask`, or the teacher of one of timm's distillation tasks, ours included. What
    else a task may call its teacher perhaps learns."""
    return task.frozen.backbone if isinstance(task, FrozenBackboneTask) else _teacher(task)


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


def learned_state(task: TrainingTask) -> dict[str, Tensor]:
    """The state of a task, without that of its frozen network."""
    state, network = task.state_dict(), frozen_network(task)
    if network is None:
        return state
    frozen = tuple(f"{name}." for name, part in task.named_modules() if part is network)
    return {key: value for key, value in state.items() if not key.startswith(frozen)}


def frozen_digest(task: TrainingTask) -> str:
    """SHA-256 of the frozen network, which a checkpoint holds in its place; "" where nothing is frozen."""
    network = frozen_network(task)
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
