"""The saved models and the images that a command is given."""

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

MODEL_HELP = "saved model, run directory, or id of a repository on the Hub"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """One saved model."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit")


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """Images under the names that training has for them, and how to run them."""
    group = parser.add_argument_group("data", "what is left out is as in the model's run")
    group.add_argument("--data", dest="data_dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group.add_argument("--split", dest="val_split", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_image_flags(group, defaults={})
    group.add_argument("--seed", type=int, help="of the draw of --val-fraction")
    add_preprocessing_flags(group)
    group.add_argument(
        "--on-bad-sample",
        choices=("raise", "skip"),
        help="an image that cannot be read ends the command, or is left out and counted",
    )
    parser.add_argument("-b", "--batch-size", type=_whole_number(1), default=64)
    parser.add_argument("-j", "--workers", type=_whole_number(0), default=0, help="data-loading processes")
    parser.add_argument(
        "--device",
        type=_usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: the GPU, where there is one)",
    )


def starting_record(args: argparse.Namespace) -> Record | None:
    """The record of the saved model with whose weights a run begins, or of the run whose checkpoint it begins with;
    None where none is known.

    Args:
        args: flags of training.
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
    """The self-distilled model of a record.

    Raises:
        ValueError: it is a truncated one.
    """
    config = hub.read_config(hub.fetch_model(record.model, revision=record.revision, only_config=True))
    if "truncated_to" in config["self_distill"]:
        raise ValueError(f"{record.model} is a truncated model, which has one exit only; give the model with all exits")
    return SelfDistillModel.from_pretrained(record.model, revision=record.revision)


def load_any_model(name: str, revision: str | None) -> nn.Module:
    """A self-distilled model, a truncated one or a plain timm model, in eval mode."""
    folder = hub.fetch_model(name, revision=revision, only_config=True)
    if "self_distill" in hub.read_network(folder):
        return load_pretrained(name, revision=hub.pin(name, folder, revision))
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


def read_data(args: argparse.Namespace, record: Record, *others: Record) -> ImageSplits:
    """The images of `add_measuring_flags`; lines say what was found. See `find_images`."""
    images, lines = find_images(args, record, others)
    print(*map(printable, lines), sep="\n", flush=True)
    return images


def open_data(
    model: nn.Module, record: Record, images: ImageSplits, args: argparse.Namespace
) -> MeasuredImages[ImageDataset]:
    """The validation images as a model takes them; a line says which preprocessing was given by hand.

    Raises:
        ValueError: they are of other classes than the model's, or the model does not take such images.
    """
    if names := as_timm(model).pretrained_cfg.get("label_names"):
        images = match_classes(images, list(names), "give images of its classes")
        if images.is_reordered:
            print(REORDERED, flush=True)
    elif images.num_classes != as_timm(model).num_classes:
        raise ValueError(
            f"{record.model} has {as_timm(model).num_classes} classes, and {images.found[-1]['from']} has"
            f" {listed(images.class_names)}; give images of its classes"
        )
    _, val_data = images.transformed(preprocessing(model, record, args))
    if not isinstance(val_data, ImageDataset):
        raise TypeError(f"a command measures images with an order, got {type(val_data).__name__}")
    on_bad_sample = args.on_bad_sample or record.settings.get("on_bad_sample")
    return MeasuredImages(val_data, args.batch_size, args.workers, "skip" if on_bad_sample == "skip" else "raise")


def preprocessing(model: nn.Module, record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """The data config of a model, changed by `PREPROCESSING_FLAGS`; a line says what is changed."""
    own = resolve_model_data_config(model)
    given = {name: value for name in PREPROCESSING_FLAGS if (value := getattr(args, name, None)) is not None}
    if not given:
        return own
    config = model_data_config(model, given.pop("img_size", None), own["input_size"][0], **given)
    changed = [f"{key} {as_text(config[key])} instead of {as_text(own[key])}" for key in own if config[key] != own[key]]
    if changed:
        print(printable(f"{record.model} is run with {', '.join(changed)}"), flush=True)
    return config


def _load_checkpoint(model: nn.Module, checkpoint: Path) -> int:
    """How many updates had made it."""
    weights = load_file(checkpoint / WEIGHTS_FILE)
    student = "trainable_module.student."  # of fitnet, at and dml, where a regressor or a peer stands beside it
    prefix = student if any(key.startswith(student) for key in weights) else "trainable_module."
    model.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})
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
