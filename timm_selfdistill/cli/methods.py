"""What examples/train.py can train with: --method, the flags that go with it, and the task that they make."""

import argparse
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

import timm
from timm.layers import convert_splitbn_model
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
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
from ..model import SelfDistillModel, wrap_self_distill
from ..task import SelfDistillTask
from ..timm_model import as_timm
from ..training.data.labels import listed
from ..training.data.transforms import model_data_config, own_class_names
from ..training.loop.initial_weights import UNREADABLE, SavedWeights, create_backbone, load_exits
from ..training.outputs.saved_models import network_args
from .program import parse_exit, say

NETWORK_FLAGS = ("exits", "head")
MEMORY_FLAGS = ("memory_momentum", "memory_share", "memory_warmup_epochs", "memory_topk")
"""Those that go with --teacher memory."""
LOSS_FLAGS = ("temperature", "t_squared", "alpha", "beta", "hint", "teacher", *MEMORY_FLAGS)
PAPER_FLAGS = ("t_squared", "hint", "teacher")
"""Those for which --paper stands."""
HEAD = "bottleneck"
KD_FLAGS = {
    "kd_temperature": ("logit", "token"),
    "kd_student_feature_dim": ("feature",),
    "kd_teacher_feature_dim": ("feature",),
    "kd_token_distill_type": ("token",),
}
"""And the kinds of --kd-distill-type that they go with."""
KD_TASKS = {"logit": LogitDistillationTask, "feature": FeatureDistillationTask, "token": TokenDistillationTask}
METHODS = {
    "plain": (),
    "dsn": NETWORK_FLAGS,
    "self-distill": (*NETWORK_FLAGS, *LOSS_FLAGS, "paper"),
    "kd": ("kd_model_name", "distill_loss_weight", "task_loss_weight", "kd_distill_type", *KD_FLAGS),
    "fitnet": ("kd_model_name", "distill_loss_weight", "task_loss_weight"),
    "at": ("kd_model_name", "distill_loss_weight", "task_loss_weight"),
    "dml": ("distill_loss_weight",),
    "dks": (*NETWORK_FLAGS, "distill_loss_weight"),
}
"""And the flags that go with them."""
EXIT_METHODS = ("dsn", "self-distill", "dks")
"""Those whose network has shallow classifiers."""
SOFTMAX_METHODS = ("kd", "dml", "dks")
"""Those whose loss compares softmaxes."""
KD_TEMPERATURE = 4.0


class DistillWeight(TypedDict, total=False):
    """--distill-loss-weight, where it is given."""

    distill_loss_weight: float


class Weights(DistillWeight, total=False):
    """And --task-loss-weight."""

    task_loss_weight: float


class _Baseline(argparse.BooleanOptionalAction):
    """Another name for --method plain; with --no- it is taken back."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string is None or not option_string.startswith("--no-"):
            namespace.method = "plain"
        elif namespace.method == "plain":
            namespace.method = parser.get_default("method")


def add_method_flags(group: Any) -> None:
    """timm's names, but for --method and --baseline."""
    group.add_argument(
        "--method",
        choices=METHODS,
        help="plain network; labels at every classifier (dsn); self distillation; with a teacher network"
        " Hinton's kd, fitnet or attention transfer (at); two networks that learn from each other"
        " (dml); classifiers that do (dks) (default: self-distill, or with --kd-model-name kd)",
    )
    group.add_argument("--baseline", action=_Baseline, default=argparse.SUPPRESS, help="--method plain")
    group.add_argument(
        "--kd-model-name",
        metavar="NAME",
        help="teacher of kd, fitnet and at: a timm model with pretrained weights, local-dir:FOLDER or hf-hub:ID",
    )
    group.add_argument(
        "--kd-distill-type",
        choices=KD_TASKS,
        help="what kd compares: logits, pooled features, or the teacher and the distillation token of a"
        " model that has one (default: logit)",
    )
    group.add_argument("--kd-temperature", type=float, help=f"of both softmaxes in kd (default: {KD_TEMPERATURE:g})")
    group.add_argument("--kd-student-feature-dim", type=int, help="of pooled features in kd (default: found)")
    group.add_argument("--kd-teacher-feature-dim", type=int, help="of pooled features in kd (default: found)")
    group.add_argument(
        "--kd-token-distill-type",
        choices=["soft", "hard"],
        help="what the token learns in kd: the teacher's softmax or its most likely class (default: soft)",
    )
    group.add_argument(
        "--distill-loss-weight",
        type=float,
        help="of what kd, fitnet, at, dml and dks add to the labels (default: 100 for fitnet, 1000 for at, else 1)",
    )
    group.add_argument(
        "--task-loss-weight",
        type=float,
        help="of the labels in kd, fitnet and at (default: 1); in kd, given alone, the distillation has the rest to 1",
    )


def check_method_flags(args: argparse.Namespace) -> None:
    """Look at the flags that go with --method.

    Raises:
        ValueError: one is missing, belongs to another method, or is out of its range.
    """
    names = dict.fromkeys(name for names in METHODS.values() for name in names if name not in METHODS["self-distill"])
    _check_belonging(args, names, args.method)
    for name in names:
        value = getattr(args, name)
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise ValueError(f"{_flag(name)} must be a number >= 0, got {value}")
    if args.method == "kd":
        kind = args.kd_distill_type or "logit"
        for name, kinds in KD_FLAGS.items():
            if getattr(args, name) is not None and kind not in kinds:
                raise ValueError(
                    f"{_flag(name)} belongs to --kd-distill-type {', '.join(kinds)}, which is {kind}; leave one out"
                )
    _check_splits(args)
    if args.method == "self-distill" and args.hint == "none" and args.beta not in (0, SelfDistillLoss().beta):
        raise ValueError(
            f"--beta {args.beta:g} is the weight of the hint, and --hint is none; add --hint map or --hint"
            " pooled, or leave --beta out"
        )
    _check_memory(args)
    if args.bce_loss and args.method in SOFTMAX_METHODS:
        raise ValueError(
            f"--bce-loss takes each class on its own, and --method {args.method} compares the softmaxes of"
            " two classifiers; leave one out"
        )
    for name in ("bce_sum", "bce_target_thresh", "bce_pos_weight"):
        if getattr(args, name) and not args.bce_loss:
            raise ValueError(f"{_flag(name)} belongs to --bce-loss, which is off; add it")
    weights = args.task_loss_weight, args.distill_loss_weight
    if args.method == "kd" and weights[1] is None and (weights[0] or 0) > 1:
        raise ValueError(
            "--task-loss-weight, given alone, must lie in [0, 1], since the distillation has the rest to"
            f" 1, got {weights[0]}; or give --distill-loss-weight, too"
        )
    if weights == (0, 0):
        raise ValueError("--task-loss-weight and --distill-loss-weight are both 0, which leaves nothing to learn from")
    if args.kd_temperature == 0:
        raise ValueError("--kd-temperature must be a number > 0, got 0")
    loads = args.pretrained or args.initial_checkpoint or args.pretrained_path
    if args.model.startswith(("local-dir:", "hf-hub:")) and not loads:
        warnings.warn(
            f"the weights of {args.model}, exits included, are not loaded; add --pretrained to start from them",
            stacklevel=2,
        )
    if args.method == "dml" and args.initial_checkpoint:
        raise ValueError(
            "--initial-checkpoint gives both networks of --method dml the same weights, so that neither"
            " has anything to teach the other; leave it out"
        )
    if "kd_model_name" in METHODS[args.method] and not args.kd_model_name:
        raise ValueError(
            f"--method {args.method} needs a teacher; give --kd-model-name, a timm model with pretrained"
            " weights for these classes, local-dir:FOLDER (best/ of another run) or hf-hub:ID"
        )


def _check_memory(args: argparse.Namespace) -> None:
    """Look at the flags that go with --teacher memory.

    Raises:
        ValueError: the teacher is another one.
    """
    if args.method != "self-distill" or args.teacher == "memory":
        return
    for name, default in loss_settings(SelfDistillLoss()).items():
        if name in MEMORY_FLAGS and getattr(args, name) != default:
            raise ValueError(
                f"{_flag(name)} belongs to --teacher memory, and the teacher is {args.teacher}; leave one out"
            )


def _check_splits(args: argparse.Namespace) -> None:
    """Look at the flags that go with several views of an image.

    Raises:
        ValueError: one of them is alone, or they do not go with another.
    """
    if args.aug_splits == 1 or args.aug_splits < 0:
        raise ValueError(f"--aug-splits must be 0 (off) or at least 2, got {args.aug_splits}")
    users = [name for name in ("jsd_loss", "split_bn", "resplit") if getattr(args, name)]
    if not args.aug_splits:
        if users:
            raise ValueError(f"{_flag(users[0])} is for several views of an image; give --aug-splits, e.g. 3")
        return
    if not (args.jsd_loss or args.split_bn):
        raise ValueError(
            f"--aug-splits {args.aug_splits} makes views of each image, for which there is no loss; give"
            " --jsd-loss, or --split-bn"
        )
    for name in ("mixup", "cutmix", "cutmix_minmax", "no_aug", "unlabelled", "freeze_backbone"):
        if getattr(args, name):
            raise ValueError(
                f"--aug-splits compares views of one image, which does not go with {_flag(name)}; leave one out"
            )
    if args.split_bn and args.sync_bn:
        raise ValueError("--split-bn and --sync-bn are two kinds of batch norm; leave one out")
    if args.batch_size == "auto":
        raise ValueError("--batch-size auto does not go with --aug-splits; give a number")
    if args.jsd_loss and args.bce_loss:
        raise ValueError("--jsd-loss and --bce-loss are two losses of the labels; leave one out")
    if args.jsd_loss and args.method in ("dml", "dks"):
        raise ValueError(f"--method {args.method} has a label loss of its own; leave --jsd-loss out")


def check_typed_flags(typed: argparse.Namespace, method: str) -> None:
    """Look at the flags of exits and their loss that were typed; those of a --config file are for whoever takes them.

    A plain network has no use for them either, but --baseline is added to a command as it is, to compare.

    Args:
        typed: None where a flag was not.

    Raises:
        ValueError: one belongs to another method.
    """
    if method != "plain":
        _check_belonging(typed, METHODS["self-distill"], method)


def _check_belonging(args: argparse.Namespace, names: Iterable[str], method: str) -> None:
    for name in names:
        if getattr(args, name) is not None and name not in METHODS[method]:
            methods = [other for other, own in METHODS.items() if name in own]
            raise ValueError(
                f"{_flag(name)} belongs to --method {', '.join(methods)}, and the method is {method}; leave one out"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class ExitFlags(TypedDict):
    exits: list[str] | None
    head: str


def take_over_exits(args: argparse.Namespace, saved: SavedWeights | None) -> ExitFlags:
    """Let exits and head be those that were trained already, unless flags name others; what a run records of them."""
    if args.method in EXIT_METHODS and saved and saved.has_exits:
        if args.exits is None and saved.exits:
            args.exits = [str(index) for index in saved.exits]
        args.head = args.head or saved.head
    args.head = args.head or HEAD
    return {"exits": args.exits, "head": args.head}


def create_task(
    args: argparse.Namespace,
    backbone: nn.Module,
    create_peer: Callable[[], nn.Module],
    saved: SavedWeights | None = None,
) -> TrainingTask:
    """The task of a method around a timm model, whose preprocessing is known. A line says what becomes of exits that
    were trained before.

    Args:
        create_peer: makes another model of its kind, for dml.
        saved: the weights that the run begins with.

    Raises:
        ValueError: there is no such exit, head or teacher, or they do not fit the model.
    """
    if saved and saved.averaged:
        say(f"the moving average of {saved.source} is taken")
    if args.method in EXIT_METHODS:
        return SelfDistillTask(_wrap(args, backbone, saved), exit_loss(vars(args)))
    if saved and saved.has_exits:
        say(f"the trained exits of {saved.source} are left out: --method {args.method} trains the plain network")
    criterion = label_criterion(vars(args))
    if args.method == "plain":
        return ClassificationTask(backbone, criterion or nn.CrossEntropyLoss(), verbose=False)
    if args.method == "dml":
        peer = _alike(create_peer(), backbone)
        if args.grad_checkpointing:
            as_timm(peer).set_grad_checkpointing(True)
        return MutualLearningTask(backbone, peer, **_distill_weight(vars(args)))
    weights = _weights(vars(args))
    teacher = create_teacher(args.kd_model_name, backbone)
    if args.method == "kd":
        return _distillation_task(args, backbone, teacher, criterion or nn.CrossEntropyLoss(), weights)
    return {"fitnet": FitNetTask, "at": AttentionTransferTask}[args.method](
        backbone, teacher, criterion=criterion, **weights
    )


def _distillation_task(
    args: argparse.Namespace, backbone: nn.Module, teacher: nn.Module, criterion: nn.Module, weights: Weights
) -> TrainingTask:
    """timm's task for --kd-distill-type.

    Raises:
        ValueError: the models do not have what it compares.
    """
    kind = args.kd_distill_type or "logit"
    settings = {"temperature": KD_TEMPERATURE} if kind in KD_FLAGS["kd_temperature"] else {}
    settings |= {
        {"kd_token_distill_type": "distill_type"}.get(name, name.removeprefix("kd_")): value
        for name in KD_FLAGS
        if (value := getattr(args, name)) is not None
    }
    if kind == "token" and not hasattr(backbone, "set_distilled_training"):
        raise ValueError(
            f"--kd-distill-type token teaches a distillation token, which {args.model} does not have; take"
            " a distilled model, such as deit_tiny_distilled_patch16_224, or --kd-distill-type logit"
        )
    return KD_TASKS[kind](backbone, teacher, criterion, verbose=False, **weights, **settings)


def _wrap(args: argparse.Namespace, backbone: nn.Module, saved: SavedWeights | None) -> SelfDistillModel:
    exits = [parse_exit(exit) for exit in args.exits] if args.exits else None
    head = args.head or HEAD
    head_args = saved.head_args if saved and saved.head == head else None
    model = wrap_self_distill(
        backbone,
        exits=exits,
        head=head,
        head_args=head_args,
        model_args=network_args(vars(args)),
        freeze_backbone=args.freeze_backbone,
    )
    if args.split_bn:
        convert_splitbn_model(model.heads, args.aug_splits)
    if saved and saved.has_exits:
        other_classes = saved.config.get("num_classes", model.num_classes) != model.num_classes
        say(*load_exits(model, saved, new_classifiers=bool(args.pretrained_path) or other_classes))
    return model


def create_teacher(name: str, student: nn.Module) -> nn.Module:
    """A trained timm model for the images of a student; a warning says where it was trained for another size, or its
    classes have other names.

    Args:
        name: of a timm model with pretrained weights, local-dir:FOLDER or hf-hub:ID.

    Raises:
        ValueError: it cannot be loaded, has no pretrained weights, or other classes or channels than the student.
    """
    if "." not in name and timm.is_model(name) and not timm.is_model_pretrained(name):
        raise ValueError(
            f"--kd-model-name {name} has no pretrained weights, and a random teacher teaches nothing;"
            " train it first and give local-dir:FOLDER, best/ of its run"
        )
    size = default_input_size(student)[-1]
    try:
        teacher = create_backbone(name, size, pretrained=True)
    except (OSError, *UNREADABLE) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"--kd-model-name {name}: {said}; give a timm model with pretrained weights, local-dir:FOLDER"
            " (best/ of another run) or hf-hub:ID"
        ) from error
    check_teacher(student, teacher)
    own_size = default_input_size(teacher)[-1]
    if own_size != size:
        warnings.warn(
            f"the teacher {name} was made for images of {own_size} pixels and sees the student's, of {size},"
            f" which may cost it accuracy; train a teacher at that size, or give --img-size {own_size}",
            stacklevel=2,
        )
    names, own = own_class_names(teacher), own_class_names(student)
    if names and own and names != own and set(names) == set(own):
        raise ValueError(
            f"the teacher {name} has {listed(names, own)}, and the images have {listed(own, names)}: the"
            " same classes in another order, which would teach wrong ones; train a teacher on these images"
            ", or give both the same order"
        )
    if names and own and names != own:
        index = next(i for i, pair in enumerate(zip(names, own)) if len(set(pair)) > 1)
        warnings.warn(
            f"class {index} is {names[index]!r} for the teacher {name} and {own[index]!r} in the data; they"
            " must mean the same classes in the same order",
            stacklevel=2,
        )
    return _alike(teacher, student).eval()


def exit_loss(settings: Mapping[str, Any]) -> SelfDistillLoss:
    """The loss of a network with shallow classifiers.

    Args:
        settings: flags by their names, as parsed, or as config.json records those of a run; defaults stand for what is
            missing.

    Raises:
        ValueError: one is out of its range, or the method has another kind of network.
    """
    method = settings.get("method", "self-distill")
    if method not in EXIT_METHODS:
        raise ValueError(f"method must be {', '.join(EXIT_METHODS)}, got {method!r}")
    label_loss = label_criterion(settings)
    if method == "dsn":
        return deep_supervision_loss(label_loss)
    if method == "dks":
        return KnowledgeSynergyLoss(**_distill_weight(settings))
    own = {name: settings[name] for name in LOSS_FLAGS if name in settings}
    if own.get("hint") == "none":
        own["hint"] = None
    if label_loss is not None:
        own |= {"label_loss": label_loss, "distill": "sigmoid" if settings.get("bce_loss") else "softmax"}
    return SelfDistillLoss(**own)


def label_criterion(settings: Mapping[str, Any]) -> nn.Module | None:
    """The loss of the labels; None is cross entropy. Mixup and smoothing make the labels soft before.

    Args:
        settings: flags by their names, see `exit_loss`.
    """
    if settings.get("jsd_loss"):
        return JsdCrossEntropy(settings["aug_splits"], smoothing=settings["smoothing"])
    if not settings.get("bce_loss"):
        return None
    return BinaryCrossEntropy(
        smoothing=0.0,
        target_threshold=settings.get("bce_target_thresh"),
        sum_classes=bool(settings.get("bce_sum")),
        pos_weight=settings.get("bce_pos_weight"),
    )


def loss_settings(loss: SelfDistillLoss) -> dict[str, float | bool | str | None]:
    """The flags that make a loss, by their names."""
    return {name: getattr(loss, name) for name in LOSS_FLAGS} | {"hint": loss.hint or "none"}


def _alike(model: nn.Module, like: nn.Module) -> nn.Module:
    """A model ready for the image size and channels of another."""
    channels, size, _ = default_input_size(like)
    model_data_config(model, size, channels)
    return model


def _distill_weight(settings: Mapping[str, Any]) -> DistillWeight:
    weight = settings.get("distill_loss_weight")
    return {} if weight is None else {"distill_loss_weight": weight}


def _weights(settings: Mapping[str, Any]) -> Weights:
    weights: Weights = {**_distill_weight(settings)}
    if (weight := settings.get("task_loss_weight")) is not None:
        weights["task_loss_weight"] = weight
    return weights
