"""Opening the saved models and images given to a command."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import parse_model_name
from torch import nn

from .. import hub
from ..hub.files import CONFIG
from ..model import SelfDistillModel
from ..timm_model import as_timm
from ..training import ImageSplits, model_data_config
from ..training.data.labels import listed
from ..training.data.loaders import MeasuredImages
from ..training.data.splits import REORDERED, ImageDataset, match_classes
from ..training.loop.initial_weights import find_config
from ..training.state.checkpoint import WEIGHTS_FILE, find_damage, list_checkpoints
from ..truncated import load_pretrained
from .data_flags import PREPROCESSING_FLAGS, add_image_flags, add_preprocessing_flags
from .measured import as_text, find_images
from .program import printable
from .record import Record, record_in
from .saved import saved_model

MODEL_HELP = "saved model, run directory, or repository on the Hub"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for one saved model."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for images, named as in training, and for running a model on them."""
    group = parser.add_argument_group("data", "defaults are the settings of the model's training run")
    group.add_argument("--data", dest="data_dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group.add_argument("--split", dest="val_split", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_image_flags(group, defaults={})
    group.add_argument("--seed", type=int, help="random seed for drawing --val-fraction")
    add_preprocessing_flags(group)
    group.add_argument(
        "--on-bad-sample",
        choices=("raise", "skip"),
        help="stop at an image that cannot be read, or skip and count such images",
    )
    parser.add_argument(
        "-b", "--batch-size", type=_whole_number(1), default=64, help="images per forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "-j", "--workers", type=_whole_number(0), default=0, help="DataLoader workers (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        type=_usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)",
    )


def starting_record(args: argparse.Namespace) -> Record | None:
    """Return the record of the saved model, or of the checkpoint's run, that a run takes its initial weights from; None
    if unknown.

    Args:
        args: training flags.
    """
    if checkpoint := args.initial_checkpoint or args.pretrained_path:
        path = Path(checkpoint).absolute()
        places = (saved_model(str(place)) for place in (path, *path.parents[:3]))
        found = next((place for place in places if (Path(place) / CONFIG).is_file()), None)
        return record_in(Path(found), found) if found else None
    place, name = parse_model_name(args.model)
    if not args.pretrained or place not in ("local-dir", "hf-hub"):
        return None
    file = find_config(place, name)
    return record_in(file.parent, name) if file else None


def load_model(record: Record) -> SelfDistillModel:
    """Load the self-distilled model of a record.

    Raises:
        ValueError: the model is truncated.
    """
    config = hub.read_config(hub.fetch_model(record.model, revision=record.revision, only_config=True))
    if "truncated_to" in config["self_distill"]:
        raise ValueError(f"{record.model} is a truncated model with only one exit; give the full model")
    return SelfDistillModel.from_pretrained(record.model, revision=record.revision)


def load_any_model(name: str, revision: str | None) -> nn.Module:
    """Load a self-distilled, truncated or plain timm model, in eval mode."""
    folder = hub.fetch_model(name, revision=revision, only_config=True)
    if "self_distill" in hub.read_network(folder):
        return load_pretrained(name, revision=hub.pin(name, folder, revision))
    folder = hub.fetch_model(name, revision=hub.pin(name, folder, revision))
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def load_checkpoints(model: nn.Module, run: Path) -> Iterator[int]:
    """Load the weights of each checkpoint of a run into its model in turn, oldest first.

    All checkpoints are verified before the first is loaded.

    Returns:
        An iterator over the number of updates of each checkpoint.

    Raises:
        FileNotFoundError: there are no checkpoints.
        ValueError: a checkpoint is damaged.
    """
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise FileNotFoundError(f"{run} is not a run directory with checkpoints/; give the --output of a training run")
    for checkpoint in checkpoints:
        if damage := find_damage(checkpoint):
            raise ValueError(f"{damage}; remove {checkpoint}")
    return (_load_checkpoint(model, checkpoint) for checkpoint in checkpoints)


def read_data(args: argparse.Namespace, record: Record, *others: Record) -> ImageSplits:
    """Load the images for the flags of `add_measuring_flags` and print what was found; see `find_images`."""
    images, lines = find_images(args, record, others)
    print(*map(printable, lines), sep="\n", flush=True)
    return images


def open_data(
    model: nn.Module, record: Record, images: ImageSplits, args: argparse.Namespace
) -> MeasuredImages[ImageDataset]:
    """Return the validation images preprocessed for a model, and print which preprocessing the flags change.

    Raises:
        ValueError: the images have other classes than the model, or the model does not accept such images.
    """
    if names := as_timm(model).pretrained_cfg.get("label_names"):
        images = match_classes(images, list(names), "give images of its classes")
        if images.is_reordered:
            print(REORDERED, flush=True)
    elif images.num_classes != as_timm(model).num_classes:
        raise ValueError(
            f"{record.model} has {as_timm(model).num_classes} classes, but {images.found[-1]['from']} has"
            f" {listed(images.class_names)}; give images of its classes"
        )
    _, val_data = images.transformed(preprocessing(model, record, args))
    if not isinstance(val_data, ImageDataset):
        raise TypeError(f"expected a map-style dataset of images, got {type(val_data).__name__}")
    on_bad_sample = args.on_bad_sample or record.settings.get("on_bad_sample")
    return MeasuredImages(val_data, args.batch_size, args.workers, "skip" if on_bad_sample == "skip" else "raise")


def preprocessing(model: nn.Module, record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Return the data config of a model with the changes of `PREPROCESSING_FLAGS`, and print the changes."""
    own = resolve_model_data_config(model)
    given = {name: value for name in PREPROCESSING_FLAGS if (value := getattr(args, name, None)) is not None}
    if not given:
        return own
    config = model_data_config(model, given.pop("img_size", None), own["input_size"][0], **given)
    changed = [f"{key} {as_text(config[key])} instead of {as_text(own[key])}" for key in own if config[key] != own[key]]
    if changed:
        print(printable(f"{record.model} is evaluated with {', '.join(changed)}"), flush=True)
    return config


def _load_checkpoint(model: nn.Module, checkpoint: Path) -> int:
    """Load a checkpoint into a model and return its number of updates."""
    weights = load_file(checkpoint / WEIGHTS_FILE)
    student = "trainable_module.student."  # in fitnet, at and dml, which also have a regressor or a peer
    prefix = student if any(key.startswith(student) for key in weights) else "trainable_module."
    model.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})
    return int(checkpoint.name.removeprefix("step-"))


def _whole_number(lowest: int) -> Callable[[str], int]:
    """Return the argparse type of a whole number with a lower bound."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {lowest}, got {text}")
        return int(text)

    return parse


def _usable_device(name: str) -> str:
    """Argparse type of a device that can be used here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:  # from torch, for unknown or missing devices
        reason = str(error).splitlines()[0].split(". ")[0]
        raise argparse.ArgumentTypeError(f"{name} cannot be used here ({reason}); try --device cpu") from error
    return name
