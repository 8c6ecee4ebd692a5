"""Train a self-distilled timm model, or with --method the plain one or one by another kind of distillation.

    python examples/train.py                                    # resnet18 on the images in examples/data
    python examples/train.py --data-dir FOLDER --model resnet50 --pretrained --epochs 30
    python examples/train.py --config recipes/cifar100_resnet18.yaml
    python examples/train.py --method kd --kd-model-name local-dir:RUN/best
    torchrun --nproc_per_node 2 examples/train.py               # or: accelerate launch examples/train.py
"""
import os
import shlex
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from timm_selfdistill import Trainer, load_images, model_data_config
from timm_selfdistill.cli import (
    EXIT_METHODS,
    NOT_UPLOADED,
    check_frozen_flags,
    check_method_flags,
    create_task,
    found_lines,
    found_settings,
    parse_args,
    run,
    say,
    take_over_exits,
    train_config,
    train_parser,
    upload_lines,
)
from timm_selfdistill.cost import default_input_size
from timm_selfdistill.training import own_class_names, print_exits, summary_title
from timm_selfdistill.training.data.class_order import fit_classes
from timm_selfdistill.training.preprocessing import create_backbone
from timm_selfdistill.training.trained_exits import find_saved_weights


def main() -> int:
    args = parse_args(train_parser(__doc__.splitlines()[0], default_data=str(Path(__file__).parent / "data")))
    config = train_config(args)
    check_frozen_flags(args)
    check_method_flags(args)

    images = load_images(
        args.dataset or args.data_dir, name=args.dataset_config, train_split=args.train_split, val_split=args.val_split,
        val_fraction=args.val_fraction, image_column=args.input_key, label_column=args.target_key,
        num_classes=args.num_classes, streaming=args.streaming, unlabelled=args.unlabelled,
        value_range=args.value_range and tuple(args.value_range), seed=args.seed)
    saved = find_saved_weights(args.model, args.pretrained, args.initial_checkpoint, args.pretrained_path)
    config.settings |= take_over_exits(args, saved)
    torch.manual_seed(config.seed)
    # A network that stays as it is keeps its own classes and size, unless flags say otherwise.
    frozen = args.freeze_backbone and (args.pretrained or args.initial_checkpoint)
    create = partial(
        create_backbone, args.model, args.img_size, pretrained=args.pretrained,
        in_chans=args.in_chans, num_classes=args.num_classes or (None if args.unlabelled else images.num_classes),
        drop_rate=args.drop, drop_path_rate=args.drop_path, initial_checkpoint=args.initial_checkpoint,
        pretrained_path=args.pretrained_path)
    backbone = create()
    if args.grad_checkpointing:
        backbone.set_grad_checkpointing()
    if args.unlabelled:
        images = images.fitting_labels(backbone.num_classes, own_class_names(backbone))
    elif args.pretrained or args.initial_checkpoint:
        images = fit_classes(images, backbone, frozen)
    class_names = images.class_names or (own_class_names(backbone) if frozen else None)
    img_size = args.img_size
    if img_size is None and not (args.pretrained or frozen):
        img_size = images.fitting_size(backbone)
    lines = found_lines(images, backbone, img_size, args)
    config.settings |= found_settings(images, lines)
    say(*lines)
    data_config = model_data_config(
        backbone, img_size, default_input_size(backbone)[0], class_names=class_names, mean=args.mean, std=args.std,
        interpolation=args.interpolation, crop_pct=args.crop_pct)
    augmentation = {"no_aug": True} if args.no_aug else {
        "train_crop_mode": args.train_crop_mode, "scale": args.scale, "ratio": args.ratio, "hflip": args.hflip,
        "vflip": args.vflip, "color_jitter": args.color_jitter, "auto_augment": args.aa, "re_prob": args.reprob,
        "cutout": args.cutout}
    train_data, val_data = images.transformed(data_config, interpolation=args.train_interpolation, **augmentation)

    task = create_task(args, backbone, create, saved)
    trainer = Trainer(task, train_data, val_data, config)
    result = trainer.fit()

    console = Console(quiet=not trainer.accelerator.is_main_process, soft_wrap=True)
    if result.interrupted_by:
        console.print(f"stopped by {result.interrupted_by.name}; go on with the same command and --resume:")
        console.print(f"  {same_command('--resume', str(result.output))}", markup=False, highlight=False)
    else:
        print_exits(console, summary_title(result.summary), result.summary["exits"])
        console.print(next_lines(result.output, args), markup=False, highlight=False)
    if result.upload:
        console.print(upload_lines(result.upload, config.hub_private), markup=False, highlight=False)
    if result.interrupted_by:  # torchrun starts again what ends with another code than 0
        return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) else 128 + result.interrupted_by
    return NOT_UPLOADED if result.upload and result.upload.failure else 0


def next_lines(output: Path, args: Namespace) -> str:
    lines = [f"run directory: {output}  (summary.json, exits.png, curves.png, best/, last/)", "next, in Python:"]
    lines += [f"  timm.create_model('local-dir:{output}/best', pretrained=True)   # plain timm"]
    if args.method in EXIT_METHODS:
        lines += [f"  SelfDistillModel.from_pretrained('{output}/best')               # all exits"]
        if args.method == "self-distill" and "--resume" not in sys.argv and not args.freeze_backbone:
            no_push = ["--no-push-to-hub"] if args.push_to_hub else []  # it would take the model's place
            lines += ["or train the plain network, to compare:",
                      f"  {same_command('--baseline', '--output', f'{output}-baseline', *no_push)}"]
    return "\n".join(lines)


def same_command(*more: str) -> str:
    """This run's command line with flags added; the last --output counts."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc_per_node", processes] if processes else ["python"]
    return shlex.join([*launcher, *sys.argv, *more])


if __name__ == "__main__":
    run(main)
