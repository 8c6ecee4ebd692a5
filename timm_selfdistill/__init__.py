"""Self-distillation for any timm model."""
from . import models
from .inference import EarlyExit, EarlyExitOutput
from .loss import SelfDistillLoss
from .model import SelfDistillModel, wrap_self_distill
from .output import SelfDistillOutput
from .task import SelfDistillTask
from .training import TrainConfig, Trainer, TrainResult, load_images, model_data_config
from .version import __version__

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
