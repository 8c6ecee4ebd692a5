"""What self distillation is compared with, as training tasks for the same `Trainer`.

Hinton's KD (arXiv:1503.02531) is timm's own `timm.task.LogitDistillationTask`.
"""

from .attention_transfer import AttentionTransferTask
from .deep_supervision import deep_supervision_loss
from .feature_maps import check_teacher
from .fitnet import FitNetTask
from .knowledge_synergy import KnowledgeSynergyLoss
from .mutual_learning import MutualLearningTask

__all__ = [
    "AttentionTransferTask",
    "FitNetTask",
    "KnowledgeSynergyLoss",
    "MutualLearningTask",
    "check_teacher",
    "deep_supervision_loss",
]
