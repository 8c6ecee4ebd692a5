"""What `evidence.py` compares: settings, networks, methods, and the grid that all are tuned on."""
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
from evidence_data import DATA
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from timm_selfdistill import SelfDistillLoss, SelfDistillTask, wrap_self_distill
from timm_selfdistill.baselines import (
    AttentionTransferTask,
    FitNetTask,
    KnowledgeSynergyLoss,
    MutualLearningTask,
    deep_supervision_loss,
)

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet10-16": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}),
    "resnet18-16": ("resnet18", {"channels": (16, 32, 64, 128)}),
    "resnet10-32": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256)}),
    "cifar_resnet18": ("cifar_resnet18", {}),
    "cifar_resnet50": ("cifar_resnet50", {}),
}
"""timm's names and arguments; the number is the width of the first stage. 0.3, 0.7, 1.3, 11 and 24 M parameters."""
TEACHERS = {"resnet10-16": "resnet18-32", "resnet18-16": "resnet18-32", "cifar_resnet18": "cifar_resnet50"}
"""Networks that teach others in kd, fitnet and at."""
NETWORKS["resnet18-32"] = ("resnet18", {"channels": (32, 64, 128, 256)})


class Setting(NamedTuple):
    data: str
    """Of `evidence_data.DATA`."""
    per_class: int | None
    """Training images of each class, None is all."""
    network: str
    passes: int
    """Over the images; a multiple of five."""


SETTINGS = {
    **{f"families-{count}": Setting("families", count, "resnet10-16", passes)
       for count, passes in ((10, 100), (30, 60), (80, 30), (160, 20))},
    "families-30-resnet18": Setting("families", 30, "resnet18-16", 60),
    "families-30-short": Setting("families", 30, "resnet10-16", 15),
    "characters-10": Setting("characters", 10, "resnet10-16", 100),
    "characters-40": Setting("characters", 40, "resnet10-16", 50),
    "fashion-50": Setting("fashion", 50, "resnet10-16", 100),
    "fashion-200": Setting("fashion", 200, "resnet10-16", 50),
    "fashion": Setting("fashion", None, "resnet10-16", 10),
    **{f"families-{count}-{network}": Setting("families", count, network, passes)
       for network in ("cifar_resnet18", "cifar_resnet50") for count, passes in ((10, 100), (30, 60), (160, 20))},
}


class Method(NamedTuple):
    make: Callable[..., TrainingTask]
    """Of backbone, weight and another network, where it needs one."""
    weights: tuple[float, ...] = ()
    """Its own, the default first."""
    other: str | None = None
    """"teacher", trained before, or "peer", trained with it."""


def _exits(backbone: nn.Module, loss: SelfDistillLoss) -> SelfDistillTask:
    return SelfDistillTask(wrap_self_distill(backbone), loss)


def _kd(backbone: nn.Module, weight: float, teacher: nn.Module) -> LogitDistillationTask:
    return LogitDistillationTask(
        backbone, teacher, nn.CrossEntropyLoss(), distill_loss_weight=weight, temperature=4.0, verbose=False)


METHODS = {
    "plain": Method(lambda backbone, _: ClassificationTask(backbone, nn.CrossEntropyLoss(), verbose=False)),
    "dsn": Method(lambda backbone, _: _exits(backbone, deep_supervision_loss())),
    "paper": Method(lambda backbone, alpha: _exits(backbone, SelfDistillLoss(alpha=alpha)), (0.3, 0.5, 0.7)),
    "deepest": Method(lambda backbone, alpha: _exits(
        backbone, SelfDistillLoss(alpha=alpha, hint=None, t_squared=True)), (0.3, 0.5, 0.7)),
    "ensemble": Method(lambda backbone, alpha: _exits(
        backbone, SelfDistillLoss(alpha=alpha, hint=None, t_squared=True, teacher="ensemble")), (0.3, 0.5, 0.7)),
    "dks": Method(lambda backbone, weight: _exits(backbone, KnowledgeSynergyLoss(weight)), (1.0, 0.3, 3.0)),
    "dml": Method(lambda backbone, weight, peer: MutualLearningTask(backbone, peer, distill_loss_weight=weight),
                  (1.0, 0.3, 3.0), "peer"),
    "kd": Method(_kd, (1.0, 0.3, 3.0), "teacher"),
    "fitnet": Method(lambda backbone, weight, teacher: FitNetTask(backbone, teacher, distill_loss_weight=weight),
                     (100.0, 30.0, 300.0), "teacher"),
    "at": Method(lambda backbone, weight, teacher: AttentionTransferTask(
        backbone, teacher, distill_loss_weight=weight), (1000.0, 300.0, 3000.0), "teacher"),
}
"""The loss of "Be Your Own Teacher" with the authors' values is "paper"; "deepest" and "ensemble" name the teacher,
have no hint, and multiply the distillation by temperature^2."""
LRS = (0.1, 0.2, 0.4)
WEIGHT_DECAYS = (2e-3, 5e-3)
EXIT_METHODS = ["plain", "dsn", "paper", "deepest", "ensemble"]
PRESETS = {
    "headline": (["families-30", "characters-10"], EXIT_METHODS),
    "when": ([name for name in SETTINGS if "cifar" not in name], EXIT_METHODS),
    "baselines": (["families-30"], list(METHODS)),
    "gpu": ([name for name in SETTINGS if "cifar" in name], EXIT_METHODS),
}
"""Settings and methods."""


def create_network(network: str, data: str) -> nn.Module:
    name, settings = NETWORKS[network]
    model = timm.create_model(name, num_classes=DATA[data], in_chans=1, **settings)
    model.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return model
