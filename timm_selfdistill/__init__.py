"""Self-distillation for any timm model."""

import importlib
from typing import TYPE_CHECKING, Any

from . import models
from .inference import EarlyExit, EarlyExitOutput
from .loss import SelfDistillLoss
from .memory import AnswerMemory, Remembered
from .model import SelfDistillModel, wrap_self_distill
from .output import SelfDistillOutput
from .truncated import TruncatedModel, load_pretrained
from .version import __version__

if TYPE_CHECKING:
    from .task import SelfDistillTask
    from .training import TrainConfig, Trainer, TrainResult, load_images, model_data_config

__all__ = [
    "AnswerMemory",
    "EarlyExit",
    "EarlyExitOutput",
    "Remembered",
    "SelfDistillLoss",
    "SelfDistillModel",
    "SelfDistillOutput",
    "SelfDistillTask",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TruncatedModel",
    "__version__",
    "load_images",
    "load_pretrained",
    "model_data_config",
    "models",
    "wrap_self_distill",
]


IMPORTED_LATER = {
    "SelfDistillTask": ".task",
    "TrainConfig": ".training",
    "TrainResult": ".training",
    "Trainer": ".training",
    "load_images": ".training",
    "model_data_config": ".training",
}
"""With the first of these names comes what trains, and with it `timm.task` and Accelerate."""


def __getattr__(name: str) -> Any:
    if name not in IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(IMPORTED_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
