"""What `evidence.py` compares: settings, networks, methods, and the grid that all are tuned on."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from evidence_data import DATA
from head_designs import GroupNormHead, HalvingHead
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from timm_selfdistill import SelfDistillLoss, SelfDistillTask, wrap_self_distill
from timm_selfdistill.baselines import (
    AttentionTransferTask,
    FitNetTask,
    KnowledgeSynergyLoss,
    MutualLearningTask,
    deep_supervision_loss,
)
from timm_selfdistill.heads import HeadFactory

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet10-8": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}),
    "resnet10-16": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}),
    "resnet18-16": ("resnet18", {"channels": (16, 32, 64, 128)}),
    "resnet10-32": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256)}),
    "resnet18-32": ("resnet18", {"channels": (32, 64, 128, 256)}),
    "cifar_resnet18": ("cifar_resnet18", {}),
    "cifar_resnet50": ("cifar_resnet50", {}),
}
"""timm's names and arguments; the number is the width of the first stage. 0.09, 0.3, 0.7, 1.3, 2.8, 11 and 24 million
parameters."""
NARROWER = {f"resnet10-{width}": width for width in (6, 12)}
NETWORKS |= {
    name: ("resnet18", {"layers": (1, 1, 1, 1), "channels": tuple(width * 2**stage for stage in range(4))})
    for name, width in NARROWER.items()
}
SHALLOWER = {"resnet10-16-layer2": 1, "resnet10-16-layer3": 2}
"""The first stages of resnet10-16 with a classifier, trained as a network of their own: the exit that they end with."""
LITE0 = "tf_efficientnet_lite0"
"""Fine-tuned from ImageNet weights; 3.5 million parameters."""
PRETRAINED = Path("output/efficientnet_lite0")
"""Where `examples/efficientnet_lite0.py` put these weights."""
TEACHERS = {"resnet10-16": "resnet10-32", "resnet18-16": "resnet18-32", "cifar_resnet18": "cifar_resnet50"}
"""Networks that teach others in kd, fitnet and at."""


class Setting(NamedTuple):
    data: str
    """Of `evidence_data.DATA`."""
    per_class: int | None
    """Training images of each class, None is all."""
    network: str
    passes: int
    """Over the images; a multiple of those in an epoch of the network's `Recipe`."""


class Recipe(NamedTuple):
    """How a network is trained, and the grid on which its methods are tuned."""

    opt: str
    image_size: int
    passes: int
    """Over the images, in an epoch of `Trainer`."""
    grid: list[dict[str, float]]
    """Points that every method is trained at; arguments of `TrainConfig`."""
    then: dict[str, float] | None = None
    """A change that every method tries at the best of these points."""


SETTINGS = {
    **{
        f"families-{count}": Setting("families", count, "resnet10-16", passes)
        for count, passes in ((10, 100), (30, 60), (80, 30), (160, 20))
    },
    **{
        f"families-30-{name}": Setting("families", 30, name, 60)
        for name in ("resnet10-8", *NARROWER, *SHALLOWER, "resnet18-32")
    },
    "families-30-short": Setting("families", 30, "resnet10-16", 15),
    "characters-10": Setting("characters", 10, "resnet10-16", 100),
    "characters-10-narrow": Setting("characters", 10, "resnet10-8", 100),
    "characters-10-deep": Setting("characters", 10, "resnet18-16", 100),
    "characters-40": Setting("characters", 40, "resnet10-16", 50),
    "fashion-50": Setting("fashion", 50, "resnet10-16", 100),
    "fashion-200": Setting("fashion", 200, "resnet10-16", 50),
    "fashion": Setting("fashion", None, "resnet10-16", 10),
    **{f"families-{count}-lite0": Setting("families", count, LITE0, 10) for count in (10, 30, 80)},
    **{f"families-{count}-lite0-long": Setting("families", count, LITE0, 20) for count in (10, 30, 80)},
    **{
        f"families-{count}-{network}": Setting("families", count, network, passes)
        for count, passes in ((30, 60), (10, 100), (160, 20))
        for network in ("cifar_resnet18", "cifar_resnet50")
    },
}


class Method(NamedTuple):
    make: Callable[..., TrainingTask]
    """Of backbone, the run's weight and updates, and another network, where it needs one."""
    weights: tuple[float | None, ...] = (None,)
    """Its own; the first is that of the other points of the grid."""
    other: str | None = None
    """"teacher", trained before, or "peer", trained with it."""
    like: str | None = None
    """The method whose chosen point it takes, where it is not tuned itself."""


class FadingLoss(SelfDistillLoss):
    """The labels of the shallow exits count less and less: 1 - update / updates (DSN, arXiv:1409.5185)."""

    def __init__(self, updates: int, **settings: Any):
        super().__init__(**settings)
        self.updates, self.done = updates, 0

    def _label(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = torch.stack([cross_entropy(z, target) for z in logits])
        deepest = (1 - self.alpha if self.teacher == "ensemble" else 1.0) * losses[-1]
        share = max(0.0, 1 - self.done / self.updates)
        self.done += torch.is_grad_enabled()
        return deepest + (1 - self.alpha) * share * losses[:-1].sum()


def _exits(
    loss: Callable[..., SelfDistillLoss],
    head: str | HeadFactory = "bottleneck",
    head_args: dict[str, int] | None = None,
    **settings: Any,
) -> Callable[..., TrainingTask]:
    """A task with exits, whose loss has these settings; its own weight is alpha, where it has one."""

    def make(backbone: nn.Module, weight: float | None, updates: int) -> SelfDistillTask:
        own = ({} if weight is None else {"alpha": weight}) | ({"updates": updates} if loss is FadingLoss else {})
        return SelfDistillTask(wrap_self_distill(backbone, head=head, head_args=head_args), loss(**own, **settings))

    return make


def _plain(backbone: nn.Module, weight: None, updates: int) -> ClassificationTask:
    return ClassificationTask(backbone, nn.CrossEntropyLoss(), verbose=False)


def _with_other(task: Callable[..., TrainingTask]) -> Callable[..., TrainingTask]:
    return lambda backbone, weight, updates, other: task(backbone, other, distill_loss_weight=weight)


def _kd(backbone: nn.Module, teacher: nn.Module, distill_loss_weight: float) -> LogitDistillationTask:
    return LogitDistillationTask(
        backbone,
        teacher,
        nn.CrossEntropyLoss(),
        distill_loss_weight=distill_loss_weight,
        temperature=4.0,
        verbose=False,
    )


ALPHAS = (0.3, 0.5, 0.7)
METHODS = {
    "plain": Method(_plain),
    "teacher": Method(_plain),
    "dsn": Method(_exits(deep_supervision_loss)),
    "paper": Method(_exits(SelfDistillLoss.paper), ALPHAS),
    "deepest": Method(_exits(SelfDistillLoss, teacher="deepest"), ALPHAS),
    "ensemble": Method(_exits(SelfDistillLoss), ALPHAS),
    "memory": Method(_exits(SelfDistillLoss, teacher="memory"), ALPHAS),
    "dks": Method(
        lambda backbone, weight, updates: SelfDistillTask(wrap_self_distill(backbone), KnowledgeSynergyLoss(weight)),
        (1.0, 0.3, 3.0),
    ),
    "dml": Method(_with_other(MutualLearningTask), (1.0, 0.3, 3.0), "peer"),
    "kd": Method(_with_other(_kd), (1.0, 0.3, 3.0), "teacher"),
    "fitnet": Method(_with_other(FitNetTask), (10.0, 1.0, 100.0), "teacher"),
    "at": Method(_with_other(AttentionTransferTask), (100.0, 10.0, 1000.0), "teacher"),
}
"""The loss of "Be Your Own Teacher" with the authors' temperature is "paper"; "deepest" and "ensemble" name
the teacher, have no hint, and multiply the distillation by temperature^2; so does "memory"."""
CHOICES = {
    "t1": {"temperature": 1.0},
    "t6": {"temperature": 6.0},
    "not-squared": {"t_squared": False},
    "map": {"hint": "map"},
    "pooled": {"hint": "pooled"},
    "linear": {"head": "linear"},
    "attention": {"head": "attention"},
    "width8": {"head_args": {"width": 8}},
    "width64": {"head_args": {"width": 64}},
    "pooled-head": {"head": "bottleneck"},  # of today, whose name it was among the lines of 0.1
    "pooled-head-groupnorm": {"head": GroupNormHead},
    "halving-head": {"head": HalvingHead},
}
"""What is changed in "ensemble", one thing at a time, at its own point of the grid."""
METHODS |= {
    f"ensemble-{name}": Method(_exits(SelfDistillLoss, **change), like="ensemble") for name, change in CHOICES.items()
}
MEMORIES: dict[str, dict[str, Any]] = {
    "m0": {"memory_momentum": 0.0},
    "m3": {"memory_momentum": 0.3},
    "m6": {"memory_momentum": 0.6},
    "m9": {"memory_momentum": 0.9},
    "half": {"memory_share": 0.5},
    "m3-half": {"memory_momentum": 0.3, "memory_share": 0.5},
    "warmup1": {"memory_warmup_epochs": 1},
    "warmup3": {"memory_warmup_epochs": 3},
    "m3-warmup3": {"memory_momentum": 0.3, "memory_warmup_epochs": 3},
}
"""Settings of "memory", each tuned itself. The warm-up is in epochs of `Trainer`, which are several passes; the running
mean has an answer of every pass."""
METHODS |= {
    f"memory-{name}": Method(_exits(SelfDistillLoss, teacher="memory", **change), ALPHAS)
    for name, change in MEMORIES.items()
}
METHODS["ensemble-fading"] = Method(_exits(FadingLoss), like="ensemble")
METHODS["dsn-fading"] = Method(_exits(FadingLoss, alpha=0.0), like="dsn")
SCRATCH = Recipe(
    "sgd",
    image_size=32,
    passes=5,
    grid=[{"lr": lr, "weight_decay": decay} for lr, decay in product((0.1, 0.2, 0.4), (2e-3, 5e-3))],
)
RECIPES = {
    LITE0: Recipe(
        "adamw",
        image_size=64,
        passes=1,
        grid=[{"lr": lr, "weight_decay": 0.05, "layer_decay": 1.0} for lr in (1e-3, 2e-3, 3e-3, 6e-3, 1e-2)],
        then={"layer_decay": 0.75},
    )
}
"""Of networks that do not begin with random weights and `SCRATCH`."""
EXIT_METHODS = ["plain", "dsn", "paper", "deepest", "ensemble"]
PRESETS = {
    "headline": (["families-30", "characters-10"], EXIT_METHODS),
    "when": (
        [name for name, setting in SETTINGS.items() if setting.network in ("resnet10-16", "resnet18-16", "resnet18-32")]
        + ["characters-10-narrow"],
        ["plain", "dsn", "ensemble", "memory"],
    ),
    "finetune": (
        [name for name in SETTINGS if SETTINGS[name].network == LITE0],
        ["plain", "dsn", "ensemble", "memory"],
    ),
    "compute": ([f"families-30-{name}" for name in ("resnet10-8", *NARROWER, *SHALLOWER)], ["plain"]),
    "baselines": (["characters-10", "families-30"], [*EXIT_METHODS, "dks", "dml", "kd", "fitnet", "at"]),
    "choices": (
        ["characters-10", "families-30"],
        ["dsn", "ensemble", *(name for name in METHODS if METHODS[name].like and name != "ensemble-pooled")],
    ),
    "memory": (
        ["characters-10", "families-30"],
        ["plain", "dsn", "ensemble", "memory", *(f"memory-{name}" for name in MEMORIES)],
    ),
    "gpu": ([name for name in SETTINGS if "cifar" in name], EXIT_METHODS),
}
"""Settings and methods. The last maps of resnet10-16 are a single pixel, where pooled hints are those of maps."""


def create_network(network: str, data: str) -> nn.Module:
    """A network with random weights for images of one channel; `LITE0` with its weights of ImageNet.

    Its new classifier begins with zeros: timm's random one is so large in EfficientNets that it spoils the features.
    """
    if network == LITE0:
        model = timm.create_model(f"local-dir:{PRETRAINED}", pretrained=True, num_classes=DATA[data])
        nn.init.zeros_(model.get_classifier().weight)
        model.pretrained_cfg.update(input_size=(3, 64, 64))
        return model
    if network in SHALLOWER:
        whole = create_network(network.rpartition("-")[0], data)
        return wrap_self_distill(whole, head="linear").truncate(SHALLOWER[network])
    name, settings = NETWORKS[network]
    model = timm.create_model(name, num_classes=DATA[data], in_chans=1, **settings)
    model.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    return model
