"""train: train a self-distilled timm model, or with --method a plain one or another kind of distillation."""

import difflib
import os
import shlex
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.layers import convert_splitbn_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..cost import default_input_size
from ..timm_model import as_timm
from ..training import (
    ImageSplits,
    Trainer,
    TrainResult,
    load_images,
    model_data_config,
    own_class_names,
    print_exits,
    summary_title,
)
from ..training.data.splits import fit_classes, in_mapped_order
from ..training.loop.initial_weights import create_backbone, find_saved_weights, init_classifier
from ..training.outputs.saved_models import network_args
from .found import found_lines, found_settings
from .methods import EXIT_METHODS, check_method_flags, create_task, take_over_exits
from .program import NOT_UPLOADED, run, say
from .train_flags import check_frozen_flags, parse_args, train_config, train_parser
from .upload_lines import upload_lines

NETWORK_FLAGS = ("model_kwargs", "bn_momentum", "bn_eps", "drop", "drop_path", "drop_block", "gp")
"""Flags that some models do not accept."""
OWN_FLAGS = {
    "num_classes": "--num-classes",
    "in_chans": "--in-chans",
    "img_size": "--img-size",
    "global_pool": "--gp",
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
    "drop_block_rate": "--drop-block",
    "bn_momentum": "--bn-momentum",
    "bn_eps": "--bn-eps",
    "pretrained": "--pretrained",
    "checkpoint_path": "--initial-checkpoint",
}
"""Flags for arguments of `timm.create_model`."""
DESCRIPTION = "train a self-distilled timm model, or with --method a plain one or another kind of distillation"


def train_command(default_data: str | Path | None = None) -> None:
    """Train as the command line says, and exit; see `train`."""
    run(lambda: train(default_data=default_data))


def train(argv: list[str] | None = None, default_data: str | Path | None = None, prog: str | None = None) -> int:
    """Train as a command line says, and return the exit code.

    Args:
        argv: command-line arguments; None for those of this process.
        default_data: folder of images if the command line names none; None makes that an error.
        prog: name of the program in messages.

    Raises:
        ValueError: a flag is wrong, or images and model do not fit together.
        FileNotFoundError: images or weights do not exist.
    """
    args = parse_args(train_parser(DESCRIPTION, default_data, prog), argv)
    config = train_config(args)
    check_frozen_flags(args)
    check_method_flags(args)
    images = _load_images(args)
    saved = find_saved_weights(args.model, args.pretrained, args.initial_checkpoint, args.pretrained_path)
    config.settings |= take_over_exits(args, saved)
    torch.manual_seed(config.seed)
    create = partial(_create_backbone, args, images)
    backbone = create()
    images, data_config, lines = _fit(images, backbone, args)
    config.settings |= found_settings(images, lines)
    say(*lines)
    interpolation = data_config["interpolation"] if args.no_aug else args.train_interpolation
    train_data, val_data = images.transformed(
        data_config, interpolation=interpolation or data_config["interpolation"], **_augmentation(args)
    )
    trainer = Trainer(create_task(args, backbone, create, saved), train_data, val_data, config)
    result = trainer.fit()
    _report(result, args, Console(quiet=not trainer.accelerator.is_main_process, soft_wrap=True))
    if result.interrupted_by:  # torchrun restarts processes that exit with a code other than 0
        return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) else 128 + result.interrupted_by
    return NOT_UPLOADED if result.upload and result.upload.failure else 0


def _load_images(args: Namespace) -> ImageSplits:
    images = load_images(
        args.dataset or args.data_dir,
        name=args.dataset_config,
        train_split=args.train_split,
        val_split=args.val_split,
        val_fraction=args.val_fraction,
        image_column=args.input_key,
        label_column=args.target_key,
        num_classes=None if args.class_map else args.num_classes,
        streaming=args.streaming,
        unlabelled=args.unlabelled,
        value_range=args.value_range and tuple(args.value_range),
        seed=args.seed,
    )
    if not args.class_map:
        return images
    return in_mapped_order(images, args.class_map, args.data_dir, args.num_classes)


def _create_backbone(args: Namespace, images: ImageSplits) -> nn.Module:
    """Create the timm model of the flags, with as many classes as the images.

    Raises:
        ValueError: the model does not exist, or does not accept one of its arguments.
    """
    _check_model_name(args.model)
    if taken := sorted(OWN_FLAGS.keys() & args.model_kwargs.keys()):
        raise ValueError(f"--model-kwargs {taken[0]} has its own flag; use {OWN_FLAGS[taken[0]]}")
    try:
        backbone = create_backbone(
            args.model,
            args.img_size,
            pretrained=args.pretrained,
            in_chans=args.in_chans,
            num_classes=args.num_classes or (None if args.unlabelled else images.num_classes),
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            initial_checkpoint=args.initial_checkpoint,
            pretrained_path=args.pretrained_path,
            **network_args(vars(args)),
        )
    except (TypeError, AttributeError, LookupError, AssertionError) as error:
        given = [f"--{name.replace('_', '-')}" for name in NETWORK_FLAGS if getattr(args, name) not in (None, {})]
        if not given:
            raise
        raise ValueError(
            f"{args.model} does not accept all of {', '.join(given)}: {' '.join(str(error).split())}; leave"
            " out the unsupported ones"
        ) from error
    init_classifier(backbone, args.head_init_scale, args.head_init_bias)
    if args.split_bn:
        if not any(isinstance(part, _BatchNorm) for part in backbone.modules()):
            raise ValueError(f"--split-bn needs batch norm, which {args.model} does not have; leave it out")
        backbone = convert_splitbn_model(backbone, args.aug_splits)
    if args.grad_checkpointing:
        as_timm(backbone).set_grad_checkpointing(True)
    return backbone


def _check_model_name(name: str) -> None:
    """Raise ValueError for a model name that timm does not have, with close matches."""
    architecture = name.split(".")[0]
    if ":" in name or "/" in name or timm.is_model(architecture):
        return
    close = difflib.get_close_matches(architecture, timm.list_models(), 3)
    raise ValueError(
        f"timm has no model {name}; "
        + (f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all")
    )


def _fit(images: ImageSplits, backbone: nn.Module, args: Namespace) -> tuple[ImageSplits, dict[str, Any], list[str]]:
    """Match images and network. Return the images with the network's classes, the data config, and lines that describe
    what was found."""
    frozen = args.freeze_backbone and (args.pretrained or args.initial_checkpoint)  # keeps its own classes and size
    if args.unlabelled:
        images = images.fitting_labels(as_timm(backbone).num_classes, own_class_names(backbone))
    elif args.pretrained or args.initial_checkpoint:
        images = fit_classes(images, backbone, frozen)
    class_names = images.class_names or (own_class_names(backbone) if frozen else None)
    img_size = args.img_size
    if img_size is None and args.fit_img_size and not (args.pretrained or args.initial_checkpoint):
        img_size = images.fitting_size(backbone)
    lines = found_lines(images, backbone, img_size, args)
    data_config = model_data_config(
        backbone,
        img_size,
        default_input_size(backbone)[0],
        class_names=class_names,
        mean=args.mean,
        std=args.std,
        interpolation=args.interpolation,
        crop_pct=args.crop_pct,
    )
    return images, data_config, lines


def _augmentation(args: Namespace) -> dict[str, Any]:
    """Return the arguments of `create_train_transform`."""
    if args.no_aug:
        return {"no_aug": True}
    return {
        "train_crop_mode": args.train_crop_mode,
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "vflip": args.vflip,
        "color_jitter": args.color_jitter,
        "color_jitter_prob": args.color_jitter_prob,
        "grayscale_prob": args.grayscale_prob,
        "gaussian_blur_prob": args.gaussian_blur_prob,
        "auto_augment": args.aa,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
        "cutout": args.cutout,
        "aug_splits": args.aug_splits,
        "resplit": args.resplit,
    }


def _report(result: TrainResult, args: Namespace, console: Console) -> None:
    """Print the result of the run and the next steps."""
    if result.interrupted_by:
        console.print(f"stopped by {result.interrupted_by.name}; resume with the same command and --resume:")
        console.print(f"  {same_command('--resume', str(result.output))}", markup=False, highlight=False)
    elif result.summary:
        print_exits(console, summary_title(result.summary), result.summary["exits"])
        console.print(next_lines(result.output, args), markup=False, highlight=False)
    if result.upload:
        console.print(upload_lines(result.upload, args.hub_private), markup=False, highlight=False)


def next_lines(output: Path, args: Namespace) -> str:
    lines = [
        f"run directory: {output}  (summary.json, exits.png, curves.png, best/, last/)",
        "load the model in Python:",
    ]
    lines += [f"  timm.create_model('local-dir:{output}/best', pretrained=True)   # plain timm"]
    if args.method in EXIT_METHODS:
        lines += [f"  SelfDistillModel.from_pretrained('{output}/best')               # all exits"]
        if args.method == "self-distill" and "--resume" not in sys.argv and not args.freeze_backbone:
            no_push = ["--no-push-to-hub"] if args.push_to_hub else []  # else it would replace the model
            lines += [
                "train the plain network for comparison:",
                f"  {same_command('--baseline', '--output', f'{output}-baseline', *no_push)}",
            ]
    return "\n".join(lines)


def same_command(*more: str) -> str:
    """Return this run's command line with added flags; the last --output applies."""
    return shlex.join([*_program(), *sys.argv[1:], *more])


def _program() -> list[str]:
    """Return how this process was started, without its arguments."""
    script, processes = sys.argv[0], os.environ.get("LOCAL_WORLD_SIZE")
    is_module = os.path.basename(script) in ("__main__.py", "timm-selfdistill")
    program = ["-m", "timm_selfdistill"] if is_module else [script]
    if processes:
        return ["torchrun", "--nproc_per_node", processes, *program]
    return [script] if os.path.basename(script) == "timm-selfdistill" else ["python", *program]
