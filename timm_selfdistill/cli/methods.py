"""What examples/train.py can train with: --method, the flags that go with it, and the task that they make."""
import argparse
import warnings
from collections.abc import Callable
from typing import Any

import timm
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from ..baselines import (
    AttentionTransferTask,
    FitNetTask,
    KnowledgeSynergyLoss,
    MutualLearningTask,
    check_teacher,
    deep_supervision_loss,
)
from ..cost import default_input_size
from ..loss import SelfDistillLoss
from ..model import wrap_self_distill
from ..task import SelfDistillTask
from ..training.preprocessing import create_backbone, model_data_config, own_class_names
from .program import parse_exit

METHODS = {
    "plain": (),
    "dsn": (),
    "self-distill": (),
    "kd": ("kd_model_name", "kd_temperature", "distill_loss_weight", "task_loss_weight"),
    "fitnet": ("kd_model_name", "distill_loss_weight", "task_loss_weight"),
    "at": ("kd_model_name", "distill_loss_weight", "task_loss_weight"),
    "dml": ("distill_loss_weight",),
    "dks": ("distill_loss_weight",),
}
"""And the flags that are theirs alone."""
EXIT_METHODS = ("dsn", "self-distill", "dks")
"""Those whose network has shallow classifiers."""
KD_TEMPERATURE = 4.0


class _Baseline(argparse.BooleanOptionalAction):
    """Another name for --method plain; with --no- it is taken back."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        if not option_string.startswith("--no-"):
            namespace.method = "plain"
        elif namespace.method == "plain":
            namespace.method = parser.get_default("method")


def add_method_flags(group: Any) -> None:
    """timm's names, but for --method and --baseline."""
    group.add_argument("--method", choices=METHODS, default="self-distill",
                       help="plain network; labels at every classifier (dsn); self distillation; with a teacher network"
                            " Hinton's kd, fitnet or attention transfer (at); two networks that learn from each other"
                            " (dml); classifiers that do (dks)")
    group.add_argument("--baseline", action=_Baseline, default=argparse.SUPPRESS, help="--method plain")
    group.add_argument("--kd-model-name", metavar="NAME",
                       help="teacher of kd, fitnet and at: a timm model with pretrained weights, local-dir:FOLDER or"
                            " hf-hub:ID")
    group.add_argument("--kd-temperature", type=float, help=f"of both softmaxes in kd (default: {KD_TEMPERATURE:g})")
    group.add_argument("--distill-loss-weight", type=float,
                       help="of what kd, fitnet, at, dml and dks add to the labels (default: 100 for fitnet, 1000 for"
                            " at, else 1)")
    group.add_argument("--task-loss-weight", type=float,
                       help="of the labels in kd, fitnet and at (default: 1); in kd, given alone, the distillation has"
                            " the rest to 1")


def check_method_flags(args: argparse.Namespace) -> None:
    """Look at the flags that go with --method.

    Raises:
        ValueError: one is missing, belongs to another method, or is out of its range.
    """
    own = METHODS[args.method]
    for name in dict.fromkeys(name for names in METHODS.values() for name in names):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        methods = [method for method, names in METHODS.items() if name in names]
        if value is not None and name not in own:
            raise ValueError(f"{flag} belongs to --method {', '.join(methods)}, and the method is {args.method}; leave"
                             " one out")
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise ValueError(f"{flag} must be a number >= 0, got {value}")
    if args.kd_temperature == 0:
        raise ValueError("--kd-temperature must be a number > 0, got 0")
    if "kd_model_name" in own and not args.kd_model_name:
        raise ValueError(f"--method {args.method} needs a teacher; give --kd-model-name, a timm model with pretrained"
                         " weights for these classes, local-dir:FOLDER (best/ of another run) or hf-hub:ID")


def create_task(
        args: argparse.Namespace, backbone: nn.Module, create_peer: Callable[[], nn.Module]) -> TrainingTask:
    """The task of a method around a timm model, whose preprocessing is settled.

    Args:
        create_peer: makes another model of its kind, for dml.

    Raises:
        ValueError, RuntimeError: there is no such exit, head or teacher, or they do not fit the model.
    """
    if args.method in EXIT_METHODS:
        exits = [parse_exit(exit) for exit in args.exits] if args.exits else None
        model = wrap_self_distill(backbone, exits=exits, head=args.head, freeze_backbone=args.freeze_backbone)
        return SelfDistillTask(model, _exit_loss(args))
    weights = _given(args, "distill_loss_weight", "task_loss_weight")
    if args.method == "plain":
        return ClassificationTask(backbone, nn.CrossEntropyLoss(), verbose=False)
    if args.method == "dml":
        peer = _alike(create_peer(), backbone)
        if args.grad_checkpointing:
            peer.set_grad_checkpointing()
        return MutualLearningTask(backbone, peer, **weights)
    teacher = create_teacher(args.kd_model_name, backbone)
    if args.method == "kd":
        temperature = KD_TEMPERATURE if args.kd_temperature is None else args.kd_temperature
        return LogitDistillationTask(
            backbone, teacher, nn.CrossEntropyLoss(), temperature=temperature, verbose=False, **weights)
    return {"fitnet": FitNetTask, "at": AttentionTransferTask}[args.method](backbone, teacher, **weights)


def create_teacher(name: str, student: nn.Module) -> nn.Module:
    """A trained timm model for the images of a student, frozen; a warning says where their classes have other names.

    Args:
        name: of a timm model with pretrained weights, local-dir:FOLDER or hf-hub:ID.

    Raises:
        ValueError: it has no pretrained weights, or other classes or channels than the student.
        RuntimeError: timm does not know it.
    """
    if timm.is_model(name) and not timm.is_model_pretrained(name):
        raise ValueError(f"--kd-model-name {name} has no pretrained weights, and a random teacher teaches nothing;"
                         " train it first and give local-dir:FOLDER, best/ of its run")
    teacher = create_backbone(name, default_input_size(student)[-1], pretrained=True)
    check_teacher(student, teacher)
    names, own = own_class_names(teacher), own_class_names(student)
    if names and own and names != own:
        index = next(i for i, pair in enumerate(zip(names, own)) if len(set(pair)) > 1)
        warnings.warn(f"class {index} is {names[index]!r} for the teacher {name} and {own[index]!r} in the data; they"
                      " must mean the same classes in the same order", stacklevel=2)
    return _alike(teacher, student).requires_grad_(False).eval()


def _exit_loss(args: argparse.Namespace) -> SelfDistillLoss:
    if args.method == "dsn":
        return deep_supervision_loss()
    if args.method == "dks":
        return KnowledgeSynergyLoss(**_given(args, "distill_loss_weight"))
    hint = None if args.hint == "none" else args.hint
    return SelfDistillLoss(
        args.temperature, args.alpha, args.beta, hint=hint, teacher=args.teacher, t_squared=args.t_squared)


def _alike(model: nn.Module, like: nn.Module) -> nn.Module:
    """A model ready for the image size and channels of another."""
    channels, size, _ = default_input_size(like)
    model_data_config(model, size, channels)
    return model


def _given(args: argparse.Namespace, *names: str) -> dict[str, float]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
