"""Training methods: --method, the flags that go with it, and the task they create."""

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
"""Flags that go with --teacher memory."""
LOSS_FLAGS = ("temperature", "t_squared", "alpha", "beta", "hint", "teacher", *MEMORY_FLAGS)
PAPER_FLAGS = ("t_squared", "hint", "teacher")
"""Flags that --paper stands for."""
HEAD = "bottleneck"
KD_FLAGS = {
    "kd_temperature": ("logit", "token"),
    "kd_student_feature_dim": ("feature",),
    "kd_teacher_feature_dim": ("feature",),
    "kd_token_distill_type": ("token",),
}
"""Flags of kd, with the values of --kd-distill-type they go with."""
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
"""Methods, with the flags that go with them."""
EXIT_METHODS = ("dsn", "self-distill", "dks")
"""Methods that train a network with exits."""
SOFTMAX_METHODS = ("kd", "dml", "dks")
"""Methods whose loss compares softmaxes."""
KD_TEMPERATURE = 4.0


class DistillWeight(TypedDict, total=False):
    """--distill-loss-weight, if given."""

    distill_loss_weight: float


class Weights(DistillWeight, total=False):
    """--distill-loss-weight and --task-loss-weight, if given."""

    task_loss_weight: float


class _Baseline(argparse.BooleanOptionalAction):
    """Sets --method plain; with --no- it restores the default."""

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
    """Add the flags of the methods, named as in timm except for --method and --baseline."""
    group.add_argument(
        "--method",
        choices=METHODS,
        help="plain network; deep supervision, labels at every exit (dsn); self-distillation; with a teacher network"
        " Hinton's kd, fitnet or attention transfer (at); two networks that learn from each other (dml); exits that"
        " learn from each other (dks) (default: self-distill, or kd with --kd-model-name)",
    )
    group.add_argument("--baseline", action=_Baseline, default=argparse.SUPPRESS, help="same as --method plain")
    group.add_argument(
        "--kd-model-name",
        metavar="NAME",
        help="teacher for kd, fitnet and at: a timm model with pretrained weights, local-dir:FOLDER or hf-hub:ID",
    )
    group.add_argument(
        "--kd-distill-type",
        choices=KD_TASKS,
        help="what kd compares with the teacher: logits, pooled features, or the distillation token of a model that has"
        " one (default: logit)",
    )
    group.add_argument(
        "--kd-temperature",
        type=float,
        help=f"temperature of both softmaxes in kd (default: {KD_TEMPERATURE:g})",
    )
    group.add_argument(
        "--kd-student-feature-dim", type=int, help="width of the student's pooled features in kd (default: detected)"
    )
    group.add_argument(
        "--kd-teacher-feature-dim", type=int, help="width of the teacher's pooled features in kd (default: detected)"
    )
    group.add_argument(
        "--kd-token-distill-type",
        choices=["soft", "hard"],
        help="what the token learns in kd: the teacher's softmax or its most likely class (default: soft)",
    )
    group.add_argument(
        "--distill-loss-weight",
        type=float,
        help="weight of the distillation in kd, fitnet, at, dml and dks (default: 100 for fitnet, 1000 for at, else 1)",
    )
    group.add_argument(
        "--task-loss-weight",
        type=float,
        help="weight of the labels in kd, fitnet and at (default: 1); if given alone in kd, the distillation has 1"
        " minus it",
    )


def check_method_flags(args: argparse.Namespace) -> None:
    """Check the flags that go with --method.

    Raises:
        ValueError: a flag is missing, belongs to another method, or is out of range.
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
                    f"{_flag(name)} belongs to --kd-distill-type {', '.join(kinds)}, but it is {kind}; leave one out"
                )
    _check_splits(args)
    if args.method == "self-distill" and args.hint == "none" and args.beta not in (0, SelfDistillLoss().beta):
        raise ValueError(
            f"--beta {args.beta:g} is the weight of the hint, but --hint is none; add --hint map or --hint pooled, or"
            " leave --beta out"
        )
    _check_memory(args)
    if args.bce_loss and args.method in SOFTMAX_METHODS:
        raise ValueError(
            f"--bce-loss treats each class separately, but --method {args.method} compares softmaxes over all classes;"
            " leave one out"
        )
    for name in ("bce_sum", "bce_target_thresh", "bce_pos_weight"):
        if getattr(args, name) and not args.bce_loss:
            raise ValueError(f"{_flag(name)} belongs to --bce-loss, which is off; add it")
    weights = args.task_loss_weight, args.distill_loss_weight
    if args.method == "kd" and weights[1] is None and (weights[0] or 0) > 1:
        raise ValueError(
            "--task-loss-weight without --distill-loss-weight must lie in [0, 1], since the distillation has 1 minus"
            f" it, got {weights[0]}; or add --distill-loss-weight"
        )
    if weights == (0, 0):
        raise ValueError("--task-loss-weight and --distill-loss-weight are both 0, so there is nothing to learn from")
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
            "--initial-checkpoint gives both networks of --method dml the same weights, so that neither can teach the"
            " other; leave it out"
        )
    if "kd_model_name" in METHODS[args.method] and not args.kd_model_name:
        raise ValueError(
            f"--method {args.method} needs a teacher; add --kd-model-name with a timm model with pretrained weights for"
            " these classes, local-dir:FOLDER (best/ of another run) or hf-hub:ID"
        )


def _check_memory(args: argparse.Namespace) -> None:
    """Check the flags that go with --teacher memory.

    Raises:
        ValueError: a flag is set and the teacher is a different one.
    """
    if args.method != "self-distill" or args.teacher == "memory":
        return
    for name, default in loss_settings(SelfDistillLoss()).items():
        if name in MEMORY_FLAGS and getattr(args, name) != default:
            raise ValueError(
                f"{_flag(name)} belongs to --teacher memory, but the teacher is {args.teacher}; leave one out"
            )


def _check_splits(args: argparse.Namespace) -> None:
    """Check the flags that go with several views of an image.

    Raises:
        ValueError: a flag needs another one, or excludes another one.
    """
    if args.aug_splits == 1 or args.aug_splits < 0:
        raise ValueError(f"--aug-splits must be 0 (off) or at least 2, got {args.aug_splits}")
    users = [name for name in ("jsd_loss", "split_bn", "resplit") if getattr(args, name)]
    if not args.aug_splits:
        if users:
            raise ValueError(f"{_flag(users[0])} needs several views of each image; add --aug-splits, e.g. 3")
        return
    if not (args.jsd_loss or args.split_bn):
        raise ValueError(
            f"--aug-splits {args.aug_splits} has no effect without --jsd-loss or --split-bn; add one of them"
        )
    for name in ("mixup", "cutmix", "cutmix_minmax", "no_aug", "unlabelled", "freeze_backbone"):
        if getattr(args, name):
            raise ValueError(
                f"--aug-splits compares views of one image and does not work with {_flag(name)}; leave one out"
            )
    if args.split_bn and args.sync_bn:
        raise ValueError("--split-bn and --sync-bn are different kinds of batch norm; leave one out")
    if args.batch_size == "auto":
        raise ValueError("--batch-size auto does not work with --aug-splits; give a number")
    if args.jsd_loss and args.bce_loss:
        raise ValueError("--jsd-loss and --bce-loss are different label losses; leave one out")
    if args.jsd_loss and args.method in ("dml", "dks"):
        raise ValueError(f"--method {args.method} has its own label loss; leave --jsd-loss out")


def check_typed_flags(typed: argparse.Namespace, method: str) -> None:
    """Check typed flags for exits and their loss; in a --config file they are ignored by methods that do not use them.

    The plain network does not use them either, but --baseline may be added to any command for a comparison.

    Args:
        typed: typed flags, None for those that were not.

    Raises:
        ValueError: a flag belongs to another method.
    """
    if method != "plain":
        _check_belonging(typed, METHODS["self-distill"], method)


def _check_belonging(args: argparse.Namespace, names: Iterable[str], method: str) -> None:
    for name in names:
        if getattr(args, name) is not None and name not in METHODS[method]:
            methods = [other for other, own in METHODS.items() if name in own]
            raise ValueError(
                f"{_flag(name)} belongs to --method {', '.join(methods)}, but the method is {method}; leave one out"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class ExitFlags(TypedDict):
    exits: list[str] | None
    head: str


def take_over_exits(args: argparse.Namespace, saved: SavedWeights | None) -> ExitFlags:
    """Set exits and head to those already trained, unless flags set others, and return them for the run's record."""
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
    """Create the task of a method for a timm model whose preprocessing is set, and print which trained exits are
    loaded.

    Args:
        create_peer: creates another such model, for dml.
        saved: the initial weights of the run.

    Raises:
        ValueError: an exit, head or teacher does not exist or does not fit the model.
    """
    if saved and saved.averaged:
        say(f"using the moving average in {saved.source}")
    if args.method in EXIT_METHODS:
        return SelfDistillTask(_wrap(args, backbone, saved), exit_loss(vars(args)))
    if saved and saved.has_exits:
        say(f"trained exits of {saved.source} not used: --method {args.method} trains the plain network")
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
    """Create timm's task for --kd-distill-type.

    Raises:
        ValueError: the model does not have what the task compares.
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
            f"--kd-distill-type token needs a distillation token, which {args.model} does not have; use a distilled"
            " model, such as deit_tiny_distilled_patch16_224, or --kd-distill-type logit"
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
    """Create a pretrained teacher for the images of a student; warn if its image size or class names differ.

    Args:
        name: a timm model with pretrained weights, local-dir:FOLDER or hf-hub:ID.

    Raises:
        ValueError: the teacher cannot be loaded, has no pretrained weights, or its classes or channels differ from the
            student's.
    """
    if "." not in name and timm.is_model(name) and not timm.is_model_pretrained(name):
        raise ValueError(
            f"--kd-model-name {name} has no pretrained weights, and an untrained teacher cannot teach; train it first"
            " and give local-dir:FOLDER, best/ of its run"
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
            f"the teacher {name} was trained on images of {own_size} pixels, but the student's have {size}, which may"
            f" reduce its accuracy; train a teacher at that size, or use --img-size {own_size}",
            stacklevel=2,
        )
    names, own = own_class_names(teacher), own_class_names(student)
    if names and own and names != own and set(names) == set(own):
        raise ValueError(
            f"the teacher {name} has {listed(names, own)}, but the images have {listed(own, names)}: the same classes"
            " in a different order; train a teacher on these images, or use the same order for both"
        )
    if names and own and names != own:
        index = next(i for i, pair in enumerate(zip(names, own)) if len(set(pair)) > 1)
        warnings.warn(
            f"class {index} is {names[index]!r} for the teacher {name} and {own[index]!r} in the data; both must have"
            " the same classes in the same order, even if their names differ",
            stacklevel=2,
        )
    return _alike(teacher, student).eval()


def exit_loss(settings: Mapping[str, Any]) -> SelfDistillLoss:
    """Create the loss of a network with exits.

    Args:
        settings: flags by name, as parsed or as recorded in config.json; missing ones have their defaults.

    Raises:
        ValueError: a value is out of range, or the method does not train exits.
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
    """Create the label loss; None for cross entropy. Mixup and smoothing are applied to the labels beforehand.

    Args:
        settings: flags by name, see `exit_loss`.
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
    """Return the flags of a loss, by name."""
    return {name: getattr(loss, name) for name in LOSS_FLAGS} | {"hint": loss.hint or "none"}


def _alike(model: nn.Module, like: nn.Module) -> nn.Module:
    """Set a model to the image size and channels of another, and return it."""
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
