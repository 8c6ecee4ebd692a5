"""Self-distillation for any timm model."""
import importlib
from typing import TYPE_CHECKING, Any

from . import models
from .inference import EarlyExit, EarlyExitOutput
from .loss import SelfDistillLoss
from .model import SelfDistillModel, wrap_self_distill
from .output import SelfDistillOutput
from .task import SelfDistillTask
from .version import __version__

if TYPE_CHECKING:
    from .training import TrainConfig, Trainer, TrainResult, load_images, model_data_config

__all__ = [
    "EarlyExit",
    "EarlyExitOutput",
    "SelfDistillLoss",
    "SelfDistillModel",
    "SelfDistillOutput",
    "SelfDistillTask",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "load_images",
    "model_data_config",
    "models",
    "wrap_self_distill",
]


def __getattr__(name: str) -> Any:
    """Import what trains, and with it Accelerate, with the first of the names that need it."""
    if name not in ("TrainConfig", "TrainResult", "Trainer", "load_images", "model_data_config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".training", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
