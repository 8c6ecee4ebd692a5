"""The networks of a training task: what learns, and what is evaluated and saved.

timm's own methods may answer None, for a task without a moving average; here that is an error.
"""

from timm.task import TrainingTask
from torch import nn

from ...model import SelfDistillModel


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
