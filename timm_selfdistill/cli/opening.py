"""The saved models and the images that a command is given."""
import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import nn

from .. import hub
from ..model import SelfDistillModel
from ..training import ImageSplits, load_images
from ..training.checkpoint import WEIGHTS_FILE, find_damage, list_checkpoints
from ..training.data.class_order import match_classes
from ..training.data.load import load_split
from ..training.data.splits import some_names
from ..training.images import FULL_RANGES, ValueRange, ValueRanges
from ..training.loading import MeasuredImages
from .program import printable

MODEL_HELP = "saved model, run directory, or id of a repository on the Hub"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """One saved model."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Images, and how to read and run them."""
    parser.add_argument("--data", required=True, metavar="DIR",
                        help="folder of images, parquet or arrow files, or data set on the Hub; not what the model"
                             " was trained with")
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of a data set on the Hub")
    parser.add_argument("--split", metavar="NAME",
                        help="default: the validation split, else the test split, else the tenth of train that"
                             " train.py leaves out")
    parser.add_argument("--input-key", metavar="COLUMN", help="image column (default: found by its type); of a folder"
                        " of image files their extensions, '.webp;.png' (default: timm's)")
    parser.add_argument("--target-key", metavar="COLUMN", help="label column (default: found by its type)")
    parser.add_argument("--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="black and white of images with more than 8 bits (default: the full range of their type)")
    parser.add_argument("--on-bad-sample", choices=("raise", "skip"),
                        help="an image that cannot be read ends the command, or is left out and counted (default: as in"
                             " the model's training)")
    parser.add_argument("-b", "--batch-size", type=_whole_number(1), default=64)
    parser.add_argument("-j", "--workers", type=_whole_number(0), default=0, help="data-loading processes")
    parser.add_argument("--device", type=_usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1, ... (default: the GPU, where there is one)")


def saved_model(model: str) -> str:
    """A run directory's best/; anything else as it is."""
    best = Path(model) / "best"
    return str(best) if best.is_dir() else model


def load_model(args: argparse.Namespace) -> SelfDistillModel:
    """The self-distilled model of `add_model_flags`."""
    return SelfDistillModel.from_pretrained(args.model, revision=args.revision)


def load_any_model(name: str, revision: str | None) -> nn.Module:
    """A self-distilled or a plain timm model, in eval mode."""
    folder = hub.fetch_model(name, revision=revision, only_config=True)
    if "self_distill" in hub.read_network(folder):
        return SelfDistillModel.from_pretrained(name, revision=hub.pin(name, folder, revision))
    folder = hub.fetch_model(name, revision=hub.pin(name, folder, revision))
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def load_checkpoints(model: nn.Module, run: Path) -> Iterator[int]:
    """Give the model of a run the weights of each of its checkpoints in turn, oldest first.

    All are looked at before the first is loaded.

    Returns:
        An iterator of how many updates had made the weights.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one is damaged.
    """
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise FileNotFoundError(f"{run} is no run directory with checkpoints/; give the --output of a training run")
    for checkpoint in checkpoints:
        if damage := find_damage(checkpoint):
            raise ValueError(f"{damage}; remove {checkpoint}")
    return (_load_checkpoint(model, checkpoint) for checkpoint in checkpoints)


def read_data(model: str, args: argparse.Namespace) -> ImageSplits:
    """The images of `add_data_flags`; a line says what was found.

    Args:
        model: whose training says what is black and white.
    """
    settings = {"name": args.dataset_config, "image_column": args.input_key, "label_column": args.target_key,
                "value_range": known_range(args.value_range, model, args.revision)}
    images = load_split(args.data, args.split, **settings) if args.split else load_images(args.data, **settings)
    print(printable(images.lines()[-1]))
    return images


def open_data(model: nn.Module, name: str, images: ImageSplits, args: argparse.Namespace) -> MeasuredImages:
    """The validation images as a model takes them.

    Args:
        name: where the model was loaded from.

    Raises:
        ValueError: they are of other classes than the model's.
    """
    backbone = model.backbone if isinstance(model, SelfDistillModel) else model
    if names := backbone.pretrained_cfg.get("label_names"):
        images = match_classes(images, list(names), "give images of its classes")
    elif images.num_classes != model.num_classes:
        raise ValueError(f"the model knows {model.num_classes} classes without names, {args.data} has"
                         f" {images.num_classes} classes ({some_names(images.class_names)})")
    _, val_data = images.transformed(resolve_model_data_config(backbone))
    on_bad_sample = args.on_bad_sample or trained_with(name, args.revision).get("on_bad_sample")
    return MeasuredImages(val_data, args.batch_size, args.workers, "skip" if on_bad_sample == "skip" else "raise")


def known_range(given: list[float] | None, model: str, revision: str | None) -> ValueRange | ValueRanges | None:
    """Black and white of images with more than 8 bits: as given, or as in a model's training."""
    settings = trained_with(model, revision)
    chosen = settings.get("value_ranges")
    if given := _as_range(given) or _as_range(settings.get("value_range")):
        return given
    ranges = {kind: _as_range(chosen.get(kind)) for kind in FULL_RANGES} if isinstance(chosen, dict) else {}
    return {kind: found for kind, found in ranges.items() if found} or None


def _as_range(value: Any) -> ValueRange | None:
    """Two numbers; None for anything else that a file may hold."""
    numbers = [part for part in value if isinstance(part, (int, float))] if isinstance(value, (list, tuple)) else []
    return tuple(numbers) if len(numbers) == 2 else None


def trained_with(name: str, revision: str | None) -> dict[str, Any]:
    """The settings of a model's training, as far as its files tell."""
    metrics = hub.read_metrics(hub.fetch_model(name, revision=revision, only_config=True))
    settings = metrics.get("settings") if isinstance(metrics, dict) else None
    return settings if isinstance(settings, dict) else {}


def _load_checkpoint(model: nn.Module, checkpoint: Path) -> int:
    """How many updates had made it."""
    weights = load_file(checkpoint / WEIGHTS_FILE)
    student = "trainable_module.student."  # of fitnet, at and dml, where a regressor or a peer stands beside it
    prefix = student if any(key.startswith(student) for key in weights) else "trainable_module."
    model.load_state_dict(
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})
    return int(checkpoint.name.removeprefix("step-"))


def _whole_number(lowest: int) -> Callable[[str], int]:
    """The type of a flag."""
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {lowest}, got {text}")
        return int(text)
    return parse


def _usable_device(name: str) -> str:
    """The type of a flag."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch's, of devices that it does not know or find
        reason = str(error).splitlines()[0].split(". ")[0]
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({reason}); try --device cpu") from error
    return name
