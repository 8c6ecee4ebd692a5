"""Flags of a training run, named as in timm, and YAML files of them."""

import argparse
import os
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from ..heads import HEADS
from ..loss import TEACHERS, SelfDistillLoss
from ..memory import FEW_CLASSES, TOPK
from ..training import TrainConfig
from ..training.config import described_fields, element_type, takes_several
from ..training.data.sources import ValFraction
from ..training.data.transforms import CROP_MODES
from ..training.outputs.run_directory import OWN_FOLDER
from .config_file import read_flags
from .data_flags import add_image_flags, add_preprocessing_flags
from .methods import (
    EXIT_METHODS,
    HEAD,
    MEMORY_FLAGS,
    METHODS,
    PAPER_FLAGS,
    add_method_flags,
    check_typed_flags,
    loss_settings,
)
from .program import Parser
from .recipes import find_recipe
from .saved import timm_name
from .timm_flags import add_timm_flags

_BOOLEAN = argparse.BooleanOptionalAction
COMPILED = ("torchcompile", "capture_exits")
"""Settings that are either off or a torch.compile backend."""
TIMM_DEFAULTS = {
    "model": "resnet50",
    "smoothing": 0.1,
    "weight_decay": 2e-5,
    "epochs": 300,
    "batch_size": 128,
    "warmup_epochs": 5.0,
    "scale": (0.08, 1.0),
    "lr_base": 0.1,
    "sched_on_updates": False,
    "decay_epochs": 90.0,
    "workers": 4,
    "checkpoint_hist": 10,
    "drop": 0.0,
    "fit_img_size": False,
}
"""Defaults of timm's train.py that differ from those here."""
SOURCE_FLAGS = (
    "data_dir",
    "dataset",
    "dataset_config",
    "train_split",
    "val_split",
    "input_key",
    "target_key",
    "num_classes",
    "streaming",
)


def train_parser(
    description: str, default_data: str | Path | None = None, prog: str | None = None
) -> argparse.ArgumentParser:
    """Create the parser of a training run's flags.

    Args:
        default_data: folder of images if the command line names none.
        prog: name of the program in messages.
    """
    parser = Parser(prog=prog, description=description, formatter_class=_HelpFormatter)
    parser.add_argument("data", nargs="?", metavar="DIR", help="same as --data-dir")
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="YAML file with any of the flags below, or the name of a recipe (see timm-selfdistill recipes); flags on"
        " the command line take precedence",
    )
    _add_data(parser.add_argument_group("data"), default_data)
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_model(parser.add_argument_group("model"))
    add_method_flags(parser.add_argument_group("method"))
    _add_distillation(parser.add_argument_group("self-distillation"))
    _add_config(parser.add_argument_group("training"))
    parser.add_argument(
        "--timm-defaults", action="store_true", help="use the defaults of timm's train.py where they differ"
    )
    add_timm_flags(parser)
    return parser


def _add_data(group: Any, default_data: str | Path | None) -> None:
    add_image_flags(
        group,
        {
            "data_dir": None if default_data is None else str(default_data),
            "train_split": "train",
            "val_fraction": ValFraction.share,
        },
    )
    group.add_argument(
        "--num-classes", type=int, help="number of classes (default: those of the data; without labels, the model's)"
    )
    group.add_argument(
        "--streaming",
        action=_BOOLEAN,
        default=False,
        help="read images during training instead of downloading and converting them first",
    )
    add_preprocessing_flags(group)
    group.add_argument(
        "--fit-img-size",
        action=_BOOLEAN,
        default=True,
        help="if images are smaller than the model's image size, train a new network at a smaller size",
    )
    group.add_argument("--in-chans", type=int, help="image channels, 1 or 3 (default: the model's, usually 3)")
    group.add_argument(
        "--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="same as --in-chans C --img-size H; H equals W"
    )
    group.add_argument(
        "--class-map",
        metavar="FILE",
        help="text file with one class name per line, in the order of the class indices (default: natural order)",
    )


def _add_augmentation(group: Any) -> None:
    group.add_argument("--no-aug", action="store_true", help="disable augmentation")
    group.add_argument("--aug", action="store_false", dest="no_aug", help="enable augmentation")
    group.add_argument(
        "--train-crop-mode",
        choices=CROP_MODES,
        default="rrc",
        help="random resized crop (rrc); resize keeping the aspect ratio, then center crop (rkrc) or random crop"
        " (rkrr); pad, then random crop (pad)",
    )
    group.add_argument("--scale", type=float, nargs="+", default=(0.5, 1.0), help="area range of random resized crop")
    group.add_argument(
        "--ratio", type=float, nargs="+", default=(3 / 4, 4 / 3), help="aspect ratio range of random resized crop"
    )
    group.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", type=float, default=0.0, help="probability of a vertical flip")
    group.add_argument("--color-jitter", type=float, default=0.4, help="color jitter factor")
    group.add_argument(
        "--color-jitter-prob", type=float, help="probability of color jitter (default: always, unless --aa is set)"
    )
    group.add_argument("--grayscale-prob", type=float, help="probability of conversion to grayscale")
    group.add_argument("--gaussian-blur-prob", type=float, help="probability of Gaussian blur")
    group.add_argument("--aa", help='AutoAugment policy, e.g. "rand-m9-mstd0.5", "original", "cifar10"')
    group.add_argument("--cutout", type=int, default=0, help="side in pixels of a square set to zero, 0 is off")
    group.add_argument("--reprob", type=float, default=0.0, help="random erasing probability")
    group.add_argument(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="random erasing mode: zeros, a random color, or noise per pixel",
    )
    group.add_argument("--recount", type=int, default=1, help="maximum number of rectangles erased at random")
    group.add_argument(
        "--aug-splits",
        type=int,
        default=0,
        help="number of views of each image, the first of them clean, 0 is off; for --jsd-loss or --split-bn",
    )
    group.add_argument(
        "--resplit", action="store_true", help="do not apply random erasing to the first (clean) view of --aug-splits"
    )
    group.add_argument(
        "--train-interpolation", default="random", help="interpolation in training: random, bilinear, bicubic, ..."
    )


def _add_model(group: Any) -> None:
    group.add_argument("--model", default="resnet18", help="name of a timm model, local-dir:FOLDER or hf-hub:ID")
    group.add_argument("--pretrained", action=_BOOLEAN, default=False, help="start from the model's pretrained weights")
    group.add_argument(
        "--pretrained-path",
        metavar="FILE",
        help="load this checkpoint of the same network, but start with new classifiers",
    )
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        help="load this checkpoint (.safetensors or weights-only .pth) completely, exits included; also a run"
        " directory, a checkpoint folder or a saved model",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=NamedValues,
        metavar="NAME=VALUE",
        help="further arguments for timm.create_model",
    )
    group.add_argument("--gp", metavar="POOL", help="global pooling type: avg, max, avgmax, ... (default: the model's)")
    group.add_argument(
        "--split-bn",
        action=_BOOLEAN,
        default=False,
        help="separate batch norm for each view of --aug-splits in training",
    )
    group.add_argument("--bn-momentum", type=float, help="batch norm momentum (default: the model's)")
    group.add_argument("--bn-eps", type=float, help="batch norm epsilon (default: the model's)")
    group.add_argument("--head-init-scale", type=float, help="scale of the initial weights of the network's classifier")
    group.add_argument("--head-init-bias", type=float, help="initial bias of the network's classifier")
    group.add_argument("--drop-block", type=float, help="DropBlock rate (default: the model's)")
    group.add_argument("--drop", type=float, help="dropout rate (default: the model's)")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate (default: the model's)")
    group.add_argument(
        "--grad-checkpointing",
        action=_BOOLEAN,
        default=False,
        help="gradient checkpointing: save memory by recomputing activations in the backward pass",
    )


def _add_distillation(group: Any) -> None:
    group.add_argument(
        "--exits",
        nargs="+",
        metavar="EXIT",
        help="feature_info indices or module names (default: those of the weights, else chosen automatically)",
    )
    group.add_argument("--head", help=f"kind of heads: {', '.join(HEADS)} (default: that of the weights, else {HEAD})")
    group.add_argument(
        "--paper",
        action=_BOOLEAN,
        default=False,
        help="the loss of the ICCV paper: --teacher deepest --hint map --no-t-squared, unless these are given",
    )
    group.add_argument("--temperature", type=float, help="temperature of both softmaxes in the distillation")
    group.add_argument(
        "--t-squared", action=_BOOLEAN, help="multiply the distillation by the square of the temperature"
    )
    group.add_argument("--alpha", type=float, help="weight of the distillation; the labels have 1 - alpha")
    group.add_argument("--beta", type=float, help="weight of the hint")
    group.add_argument(
        "--hint",
        choices=["map", "pooled", "none"],
        help="what the hint compares: feature maps or pooled features; none is off",
    )
    group.add_argument(
        "--teacher",
        choices=TEACHERS,
        help="deepest: the deepest exit; ensemble: the average logits of all exits; memory: the average of each image's"
        " ensemble logits over earlier epochs",
    )
    _add_memory(group)
    _add_label_loss(group)
    group.add_argument(
        "--freeze-backbone",
        action=_BOOLEAN,
        default=False,
        help="freeze the backbone and train only the heads, with the deepest exit as teacher and the loss of --paper",
    )
    group.set_defaults(**loss_settings(SelfDistillLoss()))


def _add_memory(group: Any) -> None:
    group.add_argument(
        "--memory-momentum", type=float, help="momentum of the moving average over epochs in --teacher memory"
    )
    group.add_argument(
        "--memory-share", type=float, help="weight of the memory in --teacher memory; the current ensemble has the rest"
    )
    group.add_argument(
        "--memory-warmup-epochs",
        type=int,
        help="epochs at the start in which --teacher memory is filled while the ensemble teaches",
    )
    group.add_argument(
        "--memory-topk",
        type=int,
        help="number of classes that --teacher memory stores per image, 0 is all (default: all of up to"
        f" {FEW_CLASSES} classes, otherwise {TOPK})",
    )


def _add_label_loss(group: Any) -> None:
    group.add_argument(
        "--jsd-loss",
        action=_BOOLEAN,
        default=False,
        help="cross entropy of the clean view plus Jensen-Shannon divergence between all views; with --aug-splits",
    )
    group.add_argument(
        "--bce-loss",
        action=_BOOLEAN,
        default=False,
        help="binary cross entropy, in which labels and distillation treat each class separately",
    )
    group.add_argument(
        "--bce-sum", action=_BOOLEAN, default=False, help="sum --bce-loss over the classes instead of averaging"
    )
    group.add_argument("--bce-target-thresh", type=float, help="threshold that makes soft labels 0 or 1 in --bce-loss")
    group.add_argument("--bce-pos-weight", type=float, help="weight of positive classes in --bce-loss")


def check_frozen_flags(args: argparse.Namespace) -> None:
    """Check the flags that go with --freeze-backbone.

    Raises:
        ValueError: flags contradict each other, or --cache-features is used with augmentation.
    """
    for name in ("unlabelled", "cache_features"):
        if getattr(args, name) and not args.freeze_backbone:
            raise ValueError(f"--{name.replace('_', '-')} needs a frozen backbone; add --freeze-backbone")
    if args.num_classes is not None and args.num_classes < 1:
        raise ValueError(f"--num-classes must be at least 1, got {args.num_classes}")
    if args.freeze_backbone and args.method not in EXIT_METHODS:
        raise ValueError(
            f"--method {args.method} trains the network itself, which --freeze-backbone freezes; leave one out"
        )
    if args.unlabelled and args.method != "self-distill":
        raise ValueError(f"--method {args.method} needs labels, but --unlabelled trains without; leave one out")
    if args.freeze_backbone and args.pretrained_path:
        raise ValueError(
            "--pretrained-path starts with a new classifier, which --freeze-backbone would leave untrained;"
            " use --initial-checkpoint instead"
        )
    if args.cache_features and not args.no_aug:
        on = [
            f"--{name.replace('_', '-')} {getattr(args, name)}"
            for name in ("train_crop_mode", "hflip", "vflip", "color_jitter", "aa", "reprob", "cutout")
            if getattr(args, name)
        ]
        raise ValueError(
            "--cache-features stores the features of each image once, but augmentation changes the images in every"
            f" epoch ({', '.join(on)}); add --no-aug"
        )
    if args.freeze_backbone and not (args.pretrained or args.initial_checkpoint):
        warnings.warn(
            "--freeze-backbone freezes randomly initialized weights, from which exits learn little; add --pretrained or"
            " --initial-checkpoint",
            stacklevel=2,
        )


def train_config(args: argparse.Namespace) -> TrainConfig:
    """Return the TrainConfig of parsed flags; all other flags are recorded in its `settings`."""
    names = {field.name for field in fields(TrainConfig)} - {"settings"}
    values: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in vars(args).items()
    }
    replaced = {
        "config",
        "paper",
        "data",
        "input_size",
        "experiment",
        "log_wandb",
        "recovery_interval",
        "timm_defaults",
    }  # by the flags they stand for
    settings = {key: value for key, value in values.items() if key not in {*names, *replaced}}
    if values["data_dir"]:  # later commands may run in another folder
        settings["data_dir"] = os.path.abspath(values["data_dir"])
    return TrainConfig(**{name: values[name] for name in names}, settings=settings)


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line after the flags of its --config file, so that typed flags take precedence.

    A typed source of images (--data-dir, --dataset) also replaces the file's flags on how to read its own, and a typed
    --paper the file's flags that it stands for.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a flag or value is wrong, or a typed flag belongs to another method.
    """
    argv = sys.argv[1:] if argv is None else argv
    by_hand = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(["data_dir", *METHODS["self-distill"]])))
    named = [name for name in (by_hand.data, by_hand.data_dir, by_hand.dataset) if name]
    if len(named) > 1:
        raise ValueError(f"images are given twice, {' and '.join(named)}; give either a folder or --dataset")
    if by_hand.config is not None:
        leave_out = {
            *(SOURCE_FLAGS if named else ()),
            *(PAPER_FLAGS if by_hand.paper else ()),
            *(MEMORY_FLAGS if by_hand.paper or by_hand.teacher not in (None, "memory") else ()),
            *_replaced(argv, by_hand),
        }
        flags = read_flags(parser, find_recipe(by_hand.config), leave_out)
        argv = [*flags, "--config", by_hand.config, *argv]  # so that no flag takes the folder as a value
    args = parser.parse_args(argv)
    if args.timm_defaults:
        parser.set_defaults(**TIMM_DEFAULTS)
        args = parser.parse_args(argv)
    if args.freeze_backbone or args.paper:
        args = parser.parse_args(argv, argparse.Namespace(**loss_settings(SelfDistillLoss.paper())))
    args.data_dir = by_hand.data or args.data_dir
    _resolve_timm_dataset(args)
    if args.log_wandb:
        args.report_to = [*dict.fromkeys([*args.report_to, "wandb"])]
    if args.experiment:
        args.output = os.path.join(args.output or OWN_FOLDER, args.experiment)
    if not (args.data_dir or args.dataset):
        raise ValueError(
            "there are no images to train on: give --data-dir FOLDER or --dataset NAME; in a clone of the repository,"
            " make demo trains on examples/data"
        )
    _apply_input_size(args)
    _apply_recovery_interval(args)
    _resolve_lr(args)
    args.method = args.method or ("kd" if args.kd_model_name else "self-distill")
    check_typed_flags(by_hand, args.method)
    _check_augmentation(args)
    args.model = timm_name(args.model)
    args.kd_model_name = args.kd_model_name and timm_name(args.kd_model_name)
    return args


def _replaced(argv: list[str], by_hand: argparse.Namespace) -> set[str]:
    """Return the file's flags that belong to others which typed flags replace."""
    replaced: set[str] = set()
    if by_hand.lr is not None:
        replaced |= {"lr_base", "lr_base_size", "lr_base_scale"}
    elif by_hand.lr_base is not None:
        replaced.add("lr")
    if any(flag == "--opt" or flag.startswith("--opt=") for flag in argv):
        replaced |= {"opt_eps", "opt_betas", "opt_kwargs"}
    if "--no-bce-loss" in argv:
        replaced |= {"bce_sum", "bce_target_thresh", "bce_pos_weight"}
    return replaced


def _resolve_lr(args: argparse.Namespace) -> None:
    """Give --lr precedence over --lr-base."""
    if args.lr is None:
        args.lr = TrainConfig.lr
    else:
        args.lr_base, args.lr_base_size, args.lr_base_scale = None, TrainConfig.lr_base_size, TrainConfig.lr_base_scale


def _check_augmentation(args: argparse.Namespace) -> None:
    """Raise ValueError for a value out of range."""
    for name in ("hflip", "vflip", "reprob", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be a probability in [0, 1], got {value}")
    for name in ("drop", "drop_path", "drop_block"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be a rate in [0, 1), got {value}")
    for name in ("scale", "ratio"):
        value = getattr(args, name)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise ValueError(f"--{name} must be a minimum and a maximum, got {' '.join(map(str, value))}")
    if args.recount < 1:
        raise ValueError(f"--recount must be at least 1, got {args.recount}")
    if args.bce_pos_weight is not None and not args.bce_pos_weight > 0:
        raise ValueError(f"--bce-pos-weight must be > 0, got {args.bce_pos_weight}")


def _resolve_timm_dataset(args: argparse.Namespace) -> None:
    """Translate timm's dataset names for the Hub, hfds/NAME and hfids/NAME.

    Raises:
        ValueError: the dataset is of another type.
    """
    kind, _, name = (args.dataset or "").partition("/")
    if kind in ("hfds", "hfids"):
        args.dataset, args.streaming = name, args.streaming or kind == "hfids"
    elif kind in ("torch", "tfds", "wds"):
        raise ValueError(
            f"--dataset {args.dataset}: timm's dataset type {kind} is not supported; give --data-dir with a folder of"
            " images, parquet files or WebDataset shards, or --dataset with a dataset on the Hub"
        )


def _apply_input_size(args: argparse.Namespace) -> None:
    """Set --in-chans and --img-size from --input-size.

    Raises:
        ValueError: it contradicts them, or is not square.
    """
    if args.input_size is None:
        return
    channels, height, width = args.input_size
    if height != width:
        raise ValueError(
            f"--input-size {channels} {height} {width}: images are read as squares; give the same height and width"
        )
    for name, value in (("in_chans", channels), ("img_size", height)):
        if getattr(args, name) not in (None, value):
            raise ValueError(
                f"--input-size {channels} {height} {width} and --{name.replace('_', '-')}"
                f" {getattr(args, name)} contradict each other; leave one out"
            )
        setattr(args, name, value)


def _apply_recovery_interval(args: argparse.Namespace) -> None:
    """Set --checkpoint-interval from --recovery-interval.

    Raises:
        ValueError: they contradict each other.
    """
    if not args.recovery_interval:
        return
    if args.checkpoint_interval not in ("", str(args.recovery_interval)):
        raise ValueError(
            f"--recovery-interval {args.recovery_interval} and --checkpoint-interval"
            f" {args.checkpoint_interval} contradict each other; leave one out"
        )
    args.checkpoint_interval = str(args.recovery_interval)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, False and empty values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", (), {}):
            return action.help
        return super()._get_help_string(action)


class NamedValues(ParseKwargs):
    """timm's NAME=VALUE, with an error that names the flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if wrong := next((value for value in values if "=" not in value), None):
            raise argparse.ArgumentError(self, f"expected NAME=VALUE, got {wrong!r}")
        super().__call__(parser, namespace, values, option_string)


def batch_size(value: str) -> int | str:
    return value if value == "auto" else int(value)


def _add_config(group: Any) -> None:
    """Add a flag for every field of TrainConfig."""
    group.add_argument("--log-wandb", action="store_true", help="add wandb to --report-to")
    group.add_argument("--experiment", default="", metavar="NAME", help="name of a run directory within --output")
    group.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="PATH",
        help="resume from this checkpoint or run directory; without a path, from the newest checkpoint in --output;"
        " auto: the same, or a new run if there is none",
    )
    group.add_argument("--recovery-interval", type=int, default=0, metavar="N", help="same as --checkpoint-interval N")
    for entry, described in described_fields(TrainConfig):
        if entry.name == "resume":
            continue
        names = [*described.flags, f"--{entry.name.replace('_', '-')}"]
        default: Any = {"opt_kwargs": {}, "lr": None}.get(entry.name, entry.default)
        options: dict[str, Any] = {"dest": entry.name, "default": default, "help": described.text(as_flags=True)}
        if entry.name in COMPILED:
            options |= {"nargs": "?", "const": "inductor", "metavar": "BACKEND"}
        elif isinstance(entry.default, bool):
            options["action"] = "store_true" if entry.name.startswith("no_") else _BOOLEAN
        elif described.choices:
            options["choices"] = described.choices
        elif entry.name == "opt_kwargs":
            options |= {"nargs": "*", "action": NamedValues, "metavar": "NAME=VALUE"}
        else:
            options["type"] = batch_size if entry.name == "batch_size" else element_type(TrainConfig, entry.name)
            options |= {"nargs": "+"} if takes_several(TrainConfig, entry.name) else {}
        group.add_argument(*names, **options)
    for name in COMPILED:
        group.add_argument(
            f"--no-{name.replace('_', '-')}",
            dest=name,
            action="store_false",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
