"""Self-distillation for any timm model."""
from typing import TYPE_CHECKING, Any

from . import models
from .inference import EarlyExit, EarlyExitOutput
from .loss import SelfDistillLoss
from .model import SelfDistillModel, wrap_self_distill
from .output import SelfDistillOutput
from .task import SelfDistillTask
from .training import TrainConfig, Trainer, TrainResult, model_data_config
from .version import __version__

if TYPE_CHECKING:
    from .training import load_images

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
    """Import `datasets`, which takes half a second, when it is needed."""
    if name != "load_images":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .training import load_images

    return load_images


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
