"""Flags of a training run: timm's names, and YAML files of them."""

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
"""Settings that are off, or name a backend of torch.compile."""
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
"""Of timm's train.py, where they are others than here."""
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
    """Flags of a training run.

    Args:
        default_data: folder of images where none are named.
        prog: the program's name in messages.
    """
    parser = Parser(prog=prog, description=description, formatter_class=_HelpFormatter)
    parser.add_argument("data", nargs="?", metavar="DIR", help="--data-dir")
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="YAML with any of the flags below, or the name of a"
        " recipe (timm-selfdistill recipes); flags given here win",
    )
    _add_data(parser.add_argument_group("data"), default_data)
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_model(parser.add_argument_group("model"))
    add_method_flags(parser.add_argument_group("method"))
    _add_distillation(parser.add_argument_group("self distillation"))
    _add_config(parser.add_argument_group("training"))
    parser.add_argument(
        "--timm-defaults", action="store_true", help="the defaults of timm's train.py where they are others than here"
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
        "--num-classes", type=int, help="of the model (default: those of the data, or without labels the model's own)"
    )
    group.add_argument(
        "--streaming",
        action=_BOOLEAN,
        default=False,
        help="read the images while training instead of downloading and converting them first",
    )
    add_preprocessing_flags(group)
    group.add_argument(
        "--fit-img-size",
        action=_BOOLEAN,
        default=True,
        help="train a new network at less than its size where the images are smaller",
    )
    group.add_argument("--in-chans", type=int, help="image channels, 1 or 3 (default: the model's, mostly 3)")
    group.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="--in-chans C --img-size H")
    group.add_argument(
        "--class-map",
        metavar="FILE",
        help="text file with the name of a class in each line, in the"
        " order of the class indices (default: natural order)",
    )


def _add_augmentation(group: Any) -> None:
    group.add_argument("--no-aug", action="store_true", help="no augmentation")
    group.add_argument("--aug", action="store_false", dest="no_aug", help="with augmentation, as by default")
    group.add_argument(
        "--train-crop-mode",
        choices=CROP_MODES,
        default="rrc",
        help="random resized crop; resize keeping the ratio and crop in the centre or anywhere; pad and crop anywhere",
    )
    group.add_argument("--scale", type=float, nargs="+", default=(0.5, 1.0), help="random resized crop, area")
    group.add_argument("--ratio", type=float, nargs="+", default=(3 / 4, 4 / 3), help="random resized crop, aspect")
    group.add_argument("--hflip", type=float, default=0.5, help="probability")
    group.add_argument("--vflip", type=float, default=0.0, help="probability")
    group.add_argument("--color-jitter", type=float, default=0.4, help="strength")
    group.add_argument("--color-jitter-prob", type=float, help="of colour jitter (default: always, without --aa)")
    group.add_argument("--grayscale-prob", type=float, help="of a grey image")
    group.add_argument("--gaussian-blur-prob", type=float, help="of a blurred image")
    group.add_argument("--aa", help='AutoAugment policy, e.g. "rand-m9-mstd0.5", "original", "cifar10"')
    group.add_argument("--cutout", type=int, default=0, help="side of a square set to zero, pixels")
    group.add_argument("--reprob", type=float, default=0.0, help="random erasing probability")
    group.add_argument(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="what erases: zeros, a random colour, or noise",
    )
    group.add_argument("--recount", type=int, default=1, help="rectangles that random erasing draws at most")
    group.add_argument(
        "--aug-splits",
        type=int,
        default=0,
        help="views of each image, the first not augmented, 0 is off; for --jsd-loss or --split-bn",
    )
    group.add_argument("--resplit", action="store_true", help="no random erasing in the first of --aug-splits")
    group.add_argument("--train-interpolation", default="random", help="random, bilinear, bicubic, ...")


def _add_model(group: Any) -> None:
    group.add_argument("--model", default="resnet18", help="name of a timm model, or local-dir:FOLDER, hf-hub:ID")
    group.add_argument("--pretrained", action=_BOOLEAN, default=False, help="start from the model's pretrained weights")
    group.add_argument(
        "--pretrained-path",
        metavar="FILE",
        help="start from a checkpoint of the same network, but with new classifiers",
    )
    group.add_argument(
        "--initial-checkpoint",
        metavar="FILE",
        help="load this checkpoint, .safetensors or weights-only .pth, into the model, all of it, exits"
        " included; or of a run the directory, a checkpoint or a saved model",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=NamedValues,
        metavar="NAME=VALUE",
        help="further arguments of the model, as in timm.create_model",
    )
    group.add_argument("--gp", metavar="POOL", help="global pooling: avg, max, avgmax, ... (default: the model's)")
    group.add_argument(
        "--split-bn",
        action=_BOOLEAN,
        default=False,
        help="batch norms of its own for each of --aug-splits, while training",
    )
    group.add_argument("--bn-momentum", type=float, help="of batch norm (default: the model's)")
    group.add_argument("--bn-eps", type=float, help="of batch norm (default: the model's)")
    group.add_argument("--head-init-scale", type=float, help="factor of the network's new classifier")
    group.add_argument("--head-init-bias", type=float, help="bias of the network's new classifier")
    group.add_argument("--drop-block", type=float, help="DropBlock rate (default: the model's)")
    group.add_argument("--drop", type=float, help="dropout rate (default: the model's)")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate (default: the model's)")
    group.add_argument(
        "--grad-checkpointing",
        action=_BOOLEAN,
        default=False,
        help="save memory: compute activations again in the backward pass",
    )


def _add_distillation(group: Any) -> None:
    group.add_argument(
        "--exits",
        nargs="+",
        metavar="EXIT",
        help="feature_info indices or module names (default: those of the weights, else chosen)",
    )
    group.add_argument("--head", help=f"{', '.join(HEADS)} (default: that of the weights, else {HEAD})")
    group.add_argument(
        "--paper",
        action=_BOOLEAN,
        default=False,
        help="the loss of the ICCV paper: --teacher deepest --hint map --no-t-squared, unless given",
    )
    group.add_argument("--temperature", type=float, help="of both softmaxes in the distillation")
    group.add_argument("--t-squared", action=_BOOLEAN, help="multiply the distillation by the temperature's square")
    group.add_argument("--alpha", type=float, help="weight of the distillation against the labels")
    group.add_argument("--beta", type=float, help="weight of the hint")
    group.add_argument("--hint", choices=["map", "pooled", "none"], help="feature maps, pooled ones or none")
    group.add_argument(
        "--teacher",
        choices=TEACHERS,
        help="deepest classifier, mean of all logits, or the mean of those given for each image in earlier epochs",
    )
    group.add_argument("--memory-momentum", type=float, help="of the running mean over epochs in --teacher memory")
    group.add_argument("--memory-share", type=float, help="of --teacher memory, the present ensemble has the rest")
    group.add_argument(
        "--memory-warmup-epochs", type=int, help="epochs in which --teacher memory is filled and the ensemble teaches"
    )
    group.add_argument(
        "--memory-topk",
        type=int,
        help=f"classes that --teacher memory keeps of an image, 0 is all (default: all of up to {FEW_CLASSES}, of more"
        f" {TOPK})",
    )
    group.add_argument(
        "--jsd-loss",
        action=_BOOLEAN,
        default=False,
        help="cross entropy of the first of --aug-splits and Jensen-Shannon divergence between all",
    )
    group.add_argument(
        "--bce-loss",
        action=_BOOLEAN,
        default=False,
        help="binary cross entropy: labels and distillation take each class on its own",
    )
    group.add_argument("--bce-sum", action=_BOOLEAN, default=False, help="sum of --bce-loss over the classes, not mean")
    group.add_argument("--bce-target-thresh", type=float, help="soft labels above it are 1 for --bce-loss, others 0")
    group.add_argument("--bce-pos-weight", type=float, help="weight of the classes that an image has, in --bce-loss")
    group.add_argument(
        "--freeze-backbone",
        action=_BOOLEAN,
        default=False,
        help="only the shallow classifiers learn, from the deepest and its feature maps (with the loss of --paper)",
    )
    group.set_defaults(**loss_settings(SelfDistillLoss()))


def check_frozen_flags(args: argparse.Namespace) -> None:
    """Look at flags that go with --freeze-backbone.

    Raises:
        ValueError: flags contradict, or --cache-features would keep what augmentation changes.
    """
    for name in ("unlabelled", "cache_features"):
        if getattr(args, name) and not args.freeze_backbone:
            raise ValueError(
                f"--{name.replace('_', '-')} is for exits on a network that stays as it is; give --freeze-backbone, too"
            )
    if args.num_classes is not None and args.num_classes < 1:
        raise ValueError(f"--num-classes must be at least 1, got {args.num_classes}")
    if args.freeze_backbone and args.method not in EXIT_METHODS:
        raise ValueError(
            f"--method {args.method} trains the network itself, and --freeze-backbone keeps it as it is; leave one out"
        )
    if args.unlabelled and args.method != "self-distill":
        raise ValueError(f"--method {args.method} learns from labels, and --unlabelled has none; leave one out")
    if args.freeze_backbone and args.pretrained_path:
        raise ValueError(
            "--pretrained-path begins with a new classifier, which --freeze-backbone would keep random;"
            " give --initial-checkpoint instead"
        )
    if args.cache_features and not args.no_aug:
        on = [
            f"--{name.replace('_', '-')} {getattr(args, name)}"
            for name in ("train_crop_mode", "hflip", "vflip", "color_jitter", "aa", "reprob", "cutout")
            if getattr(args, name)
        ]
        raise ValueError(
            "--cache-features keeps the features of each image, and augmentation changes images in every"
            f" epoch ({', '.join(on)}); add --no-aug"
        )
    if args.freeze_backbone and not (args.pretrained or args.initial_checkpoint):
        warnings.warn(
            "--freeze-backbone keeps random weights, from which exits learn little: no weights are loaded;"
            " give --pretrained or --initial-checkpoint",
            stacklevel=2,
        )


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The TrainConfig in parsed flags; the other flags are recorded in its `settings`."""
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
    }  # by the flags for which they stand
    settings = {key: value for key, value in values.items() if key not in {*names, *replaced}}
    if values["data_dir"]:  # later commands may be given in another folder
        settings["data_dir"] = os.path.abspath(values["data_dir"])
    return TrainConfig(**{name: values[name] for name in names}, settings=settings)


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, with the flags of its --config file in front, so that those given by hand win.

    Images named by hand (--data-dir, --dataset) take the place of the file's, with all that says how to read those, and
    --paper by hand that of the file's flags for which it stands.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a flag or value is wrong, by hand or in the file, or a flag typed belongs to another method.
    """
    argv = sys.argv[1:] if argv is None else argv
    by_hand = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(["data_dir", *METHODS["self-distill"]])))
    named = [name for name in (by_hand.data, by_hand.data_dir, by_hand.dataset) if name]
    if len(named) > 1:
        raise ValueError(f"the images are named twice, {' and '.join(named)}; give a folder or --dataset")
    if by_hand.config is not None:
        leave_out = {
            *(SOURCE_FLAGS if named else ()),
            *(PAPER_FLAGS if by_hand.paper else ()),
            *(MEMORY_FLAGS if by_hand.paper or by_hand.teacher not in (None, "memory") else ()),
            *_replaced(argv, by_hand),
        }
        flags = read_flags(parser, find_recipe(by_hand.config), leave_out)
        argv = [*flags, "--config", by_hand.config, *argv]  # so that no flag before it takes the folder for a value
    args = parser.parse_args(argv)
    if args.timm_defaults:
        parser.set_defaults(**TIMM_DEFAULTS)
        args = parser.parse_args(argv)
    if args.freeze_backbone or args.paper:
        args = parser.parse_args(argv, argparse.Namespace(**loss_settings(SelfDistillLoss.paper())))
    args.data_dir = by_hand.data or args.data_dir
    _take_timms_data_set(args)
    if args.log_wandb:
        args.report_to = [*dict.fromkeys([*args.report_to, "wandb"])]
    if args.experiment:
        args.output = os.path.join(args.output or OWN_FOLDER, args.experiment)
    if not (args.data_dir or args.dataset):
        raise ValueError(
            "there are no images to train on: give --data-dir FOLDER or --dataset NAME; in a clone of the"
            " repository make demo trains on those in examples/data"
        )
    _take_input_size(args)
    _take_recovery_interval(args)
    _settle_lr(args)
    args.method = args.method or ("kd" if args.kd_model_name else "self-distill")
    check_typed_flags(by_hand, args.method)
    _check_augmentation(args)
    args.model = timm_name(args.model)
    args.kd_model_name = args.kd_model_name and timm_name(args.kd_model_name)
    return args


def _replaced(argv: list[str], by_hand: argparse.Namespace) -> set[str]:
    """Flags of a file that go with others of it, in the place of which some were typed."""
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


def _settle_lr(args: argparse.Namespace) -> None:
    """Let --lr come before --lr-base."""
    if args.lr is None:
        args.lr = TrainConfig.lr
    else:
        args.lr_base, args.lr_base_size, args.lr_base_scale = None, TrainConfig.lr_base_size, TrainConfig.lr_base_scale


def _check_augmentation(args: argparse.Namespace) -> None:
    """Raise ValueError for a value that is out of its range."""
    for name in ("hflip", "vflip", "reprob", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is a probability, in [0, 1], got {value}")
    for name in ("drop", "drop_path", "drop_block"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is a rate, in [0, 1), got {value}")
    for name in ("scale", "ratio"):
        value = getattr(args, name)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise ValueError(f"--{name} is the least and the most, got {' '.join(map(str, value))}")
    if args.recount < 1:
        raise ValueError(f"--recount must be at least 1, got {args.recount}")
    if args.bce_pos_weight is not None and not args.bce_pos_weight > 0:
        raise ValueError(f"--bce-pos-weight must be > 0, got {args.bce_pos_weight}")


def _take_timms_data_set(args: argparse.Namespace) -> None:
    """Let a data set as timm names it, its kind before its name, be one on the Hub.

    Raises:
        ValueError: it is of another kind.
    """
    kind, _, name = (args.dataset or "").partition("/")
    if kind in ("hfds", "hfids"):
        args.dataset, args.streaming = name, args.streaming or kind == "hfids"
    elif kind in ("torch", "tfds", "wds"):
        raise ValueError(
            f"--dataset {args.dataset}: timm's data sets of the kind {kind} are not read; give --data-dir"
            " with a folder of images, parquet files or WebDataset shards, or --dataset with an id on the"
            " Hub"
        )


def _take_input_size(args: argparse.Namespace) -> None:
    """Let --input-size be --in-chans and --img-size.

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
                f" {getattr(args, name)} contradict; leave one out"
            )
        setattr(args, name, value)


def _take_recovery_interval(args: argparse.Namespace) -> None:
    """Let --recovery-interval be --checkpoint-interval.

    Raises:
        ValueError: they contradict.
    """
    if not args.recovery_interval:
        return
    if args.checkpoint_interval not in ("", str(args.recovery_interval)):
        raise ValueError(
            f"--recovery-interval {args.recovery_interval} and --checkpoint-interval"
            f" {args.checkpoint_interval} contradict; leave one out"
        )
    args.checkpoint_interval = str(args.recovery_interval)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

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
    """A flag for every field of TrainConfig."""
    group.add_argument("--log-wandb", action="store_true", help="--report-to wandb, beside others")
    group.add_argument("--experiment", default="", metavar="NAME", help="run directory below --output")
    group.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="PATH",
        help="go on from a checkpoint or run directory; without a path, from the newest in --output;"
        " auto: likewise, but a new run where there is none",
    )
    group.add_argument("--recovery-interval", type=int, default=0, metavar="N", help="--checkpoint-interval N")
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
