"""The command line: timm's flag names, YAML files of them, and errors in one line."""
import argparse
import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import yaml

from .heads import HEADS
from .training import TrainConfig
from .training.config import SCHEDULES

DEBUG_VARIABLE = "TIMM_SELFDISTILL_DEBUG"
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, AssertionError, ImportError)


def run(main: Callable[[], int | None]) -> None:
    """Run a program; an error becomes one line and exit code 2. TIMM_SELFDISTILL_DEBUG=1 shows the traceback."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        sys.exit(main())
    except USER_ERRORS as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        # An error from a data-loading process carries that process's traceback; its last line is the message.
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        line = lines[-1].removeprefix(f"{type(error).__name__}: ") if "Traceback" in str(error) else lines[0]
        expected = isinstance(error, (ValueError, OSError, FloatingPointError))
        more = "" if expected else f" ({DEBUG_VARIABLE}=1 shows where)"
        print(f"{os.path.basename(sys.argv[0])}: error: {line}{more}", file=sys.stderr)
        sys.exit(2)


def train_parser(description: str, default_data: str) -> argparse.ArgumentParser:
    """Flags of a training run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML with any of the flags below; flags given here win")
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", default=default_data, action=_DataDir,
                       help="folder of images, parquet or arrow files")
    group.add_argument("--dataset", metavar="NAME", help="data set on the Hub, instead of --data-dir")
    group.add_argument("--dataset-config", metavar="NAME", help="its configuration")
    group.add_argument("--train-split", metavar="NAME", default="train", help="name of the training split")
    group.add_argument("--val-split", metavar="NAME", help="default: the first of validation, val, valid, test")
    group.add_argument("--val-fraction", type=float, default=0.1, help="of the training split, where there is no other")
    group.add_argument("--input-key", metavar="COLUMN", help="image column (default: found by its type)")
    group.add_argument("--target-key", metavar="COLUMN", help="label column (default: found by its type)")
    group.add_argument("--img-size", type=int, help="pixels (default: the model's, less where the images are small)")
    group.add_argument("--in-chans", type=int, help="image channels, 1 or 3 (default: the images')")
    group.add_argument("--mean", type=float, nargs="+",
                       help="of the pixels, one value or one a channel (default: the model's)")
    group.add_argument("--std", type=float, nargs="+", help="likewise")
    group.add_argument("--interpolation", help="bicubic, bilinear, ... (default: the model's)")
    group.add_argument("--crop-pct", type=float, help="centre crop for validation (default: the model's)")

    group = parser.add_argument_group("augmentation")
    group.add_argument("--no-aug", action="store_true", help="no augmentation")
    group.add_argument("--train-crop-mode", choices=["rrc", "rkrc", "rkrr", "pad"], default="rrc",
                       help="random resized crop; resize keeping the ratio and crop; pad and crop")
    group.add_argument("--scale", type=float, nargs=2, default=(0.5, 1.0), help="random resized crop, area")
    group.add_argument("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="random resized crop, aspect")
    group.add_argument("--hflip", type=float, default=0.5, help="probability")
    group.add_argument("--vflip", type=float, default=0.0, help="probability")
    group.add_argument("--color-jitter", type=float, default=0.4, help="strength")
    group.add_argument("--aa", help='AutoAugment policy, e.g. "rand-m9-mstd0.5", "original", "cifar10"')
    group.add_argument("--cutout", type=int, default=0, help="side of a square set to zero, pixels")
    group.add_argument("--reprob", type=float, default=0.0, help="random erasing probability")
    group.add_argument("--train-interpolation", default="random", help="random, bilinear, bicubic, ...")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="resnet18", help="name of a timm model, or local-dir:FOLDER, hf-hub:ID")
    group.add_argument("--pretrained", action=_BOOLEAN, default=False,
                       help="start from the model's pretrained weights")
    group.add_argument("--drop", type=float, help="dropout rate (default: the model's)")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate (default: the model's)")
    group.add_argument("--grad-checkpointing", action=_BOOLEAN, default=False,
                       help="save memory: compute activations again in the backward pass")

    group = parser.add_argument_group("self distillation")
    group.add_argument("--exits", nargs="+", metavar="EXIT",
                       help="feature_info indices or module names (default: chosen)")
    group.add_argument("--head", default="bottleneck", help=", ".join(HEADS))
    group.add_argument("--temperature", type=float, default=3.0, help="of both softmaxes in the distillation")
    group.add_argument("--alpha", type=float, default=0.3, help="weight of the distillation against the labels")
    group.add_argument("--beta", type=float, default=0.03, help="weight of the hint")
    group.add_argument("--hint", choices=["map", "pooled", "none"], default="map",
                       help="feature maps, pooled ones or none")
    group.add_argument("--teacher", choices=["deepest", "ensemble"], default="deepest",
                       help="classifier, or the mean of all logits")
    group.add_argument("--freeze-backbone", action=_BOOLEAN, default=False, help="only the shallow classifiers learn")
    group.add_argument("--baseline", action=_BOOLEAN, default=False,
                       help="train the plain model in the same loop instead")

    _add_config(parser.add_argument_group("training"))
    return parser


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The TrainConfig in parsed flags; the other flags are recorded in its `settings`."""
    names = {field.name for field in fields(TrainConfig)} - {"settings"}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(args).items()}
    settings = {key: value for key, value in values.items() if key not in {*names, "config"}}
    return TrainConfig(**{name: values[name] for name in names}, settings=settings)


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, with the flags of its --config file in front, so that those given by hand win.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no YAML of flags and values, or holds an unknown flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    return parser.parse_args([*_read_flags(parser, Path(args.config)), *argv]) if args.config else args


def _read_flags(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --config takes a YAML file, e.g. one of recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold flags and their values, as in 'lr: 0.1', got {type(values).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags = []
    for key, value in values.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            close = difflib.get_close_matches(str(key).replace("-", "_"), actions, 1)
            hint = f"; did you mean {close[0].replace('_', '-')}?" if close else ""
            raise ValueError(f"{path}: unknown flag {key!r}{hint}")
        flags += _as_flag(action, value, f"{path}: {key}")
    return flags


def _as_flag(action: argparse.Action, value: Any, where: str) -> list[str]:
    """What one would type for a value of a YAML file."""
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return action.option_strings[:1] if value else action.option_strings[1:]
    if isinstance(value, (bool, dict)) or (isinstance(value, list) and action.nargs in (None, "?")):
        raise ValueError(f"{where} takes {'one value' if action.nargs in (None, '?') else 'values'}, got {value!r}")
    if isinstance(value, list):
        return [action.option_strings[-1], *map(str, value)] if value else []
    return [f"{action.option_strings[-1]}={value}"]


_BOOLEAN = argparse.BooleanOptionalAction


class _DataDir(argparse.Action):
    """A folder given later takes the place of a data set on the Hub, as of a --config file."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.data_dir, namespace.dataset = values, None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", ()):
            return action.help
        return super()._get_help_string(action)


def parse_exits(exits: list[str] | None) -> list[int | str] | None:
    return None if exits is None else [int(exit) if exit.lstrip("-").isdigit() else exit for exit in exits]


_SHORT = {"batch_size": "-b", "workers": "-j"}
_HELP = {
    "decay_epochs": "between two steps of the step schedule",
    "decay_milestones": "epochs of the steps of the multistep schedule",
    "decay_rate": "factor of a step",
    "mixup_prob": "of mixup or cutmix on a batch",
    "mixup_switch_prob": "of cutmix where both are on",
    "mixup_mode": "batch, pair or elem",
    "mixup_off_epoch": "epoch from which both are off, 0 is never",
    "model_ema_warmup": "a faster average at the beginning",
    "channels_last": "memory format of images and weights",
    "torchcompile": "compile the model",
    "validation_batch_size": "(default: the batch size)",
    "log_interval": "updates between two looks at the losses",
    "checkpoint_hist": "checkpoints kept",
    "output": "run directory (default: a new one under output/train)",
    "batch_size": "images per process and forward pass",
    "opt": "any of timm's optimizers",
    "sched": ", ".join(SCHEDULES),
    "smoothing": "label smoothing",
    "mixup": "alpha, 0 is off",
    "cutmix": "alpha, 0 is off",
    "model_ema": "keep, evaluate and save an average of the weights",
    "amp": "mixed precision",
    "amp_dtype": "float16 or bfloat16",
    "grad_accum_steps": "forward passes per update",
    "clip_grad": "highest gradient norm",
    "workers": "data-loading processes per training process",
    "report_to": "trackers, e.g. tensorboard wandb",
}


def _add_config(group: Any) -> None:
    """A flag for every field of TrainConfig."""
    group.add_argument("--resume", nargs="?", const="latest", metavar="PATH",
                       help="go on from a checkpoint or run directory; without a path, from the newest in --output")
    for field in fields(TrainConfig):
        if field.name in ("resume", "settings"):
            continue
        flags = [f"--{field.name.replace('_', '-')}"]
        if field.name in _SHORT:
            flags.insert(0, _SHORT[field.name])
        options: dict[str, Any] = {"default": field.default}
        options["help"] = _HELP.get(field.name, field.name.replace("_", " "))
        if isinstance(field.default, bool):
            options["action"] = _BOOLEAN
        elif isinstance(field.default, tuple):
            options |= {"nargs": "+", "type": int if field.name == "decay_milestones" else str}
        else:
            options["type"] = {"validation_batch_size": int, "clip_grad": float}.get(field.name, type(field.default))
        group.add_argument(*flags, **options)
