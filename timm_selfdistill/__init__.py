"""Self-distillation for any timm model."""
from .loss import SelfDistillLoss
from .model import SelfDistillModel, SelfDistillOutput, wrap_self_distill
from .task import SelfDistillTask
from .version import __version__

__all__ = [
    "SelfDistillLoss",
    "SelfDistillModel",
    "SelfDistillOutput",
    "SelfDistillTask",
    "__version__",
    "wrap_self_distill",
]
