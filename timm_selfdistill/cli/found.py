"""What a run prints and records about its images before it starts."""

import argparse
from typing import TypedDict

from torch import nn

from ..cost import default_input_size
from ..timm_model import as_timm
from ..training import ImageSplits
from ..training.data.sources import FoundSplit
from ..training.data.splits import has_new_classifier
from .measured import trained_before
from .opening import starting_record
from .program import printable

KINDS = {"I": "integers of more than 8 bits", "F": "floating-point numbers"}


def found_lines(images: ImageSplits, backbone: nn.Module, img_size: int | None, args: argparse.Namespace) -> list[str]:
    """Return a line for each split, and lines on how and why images are read this way.

    Args:
        backbone: the backbone as created, before `model_data_config`.
        img_size: image size in pixels; None is the backbone's own.
        args: training flags.
    """
    channels, *own_size = default_input_size(backbone)
    height, width = [img_size] * 2 if img_size else own_size
    lines = [
        *images.lines(),
        f"read at {width} x {height} pixels ({_why_size(images, img_size, own_size, args)}) with"
        f" {channels} channel{'s' * (channels > 1)} ({_why_channels(channels, args)})",
    ]
    if args.value_range:
        lines.append("in images with more than 8 bits, {:g} is black and {:g} is white".format(*args.value_range))
    else:
        lines += [
            f"in images of {KINDS[kind]}, {black:g} is black and {white:g} is white"
            for kind, (black, white) in images.sample.ranges.items()
        ]
    if images.sample.grey and channels == 3:
        lines.append("all sampled images are grayscale: --in-chans 1 is enough")
    if (args.pretrained or args.initial_checkpoint) and has_new_classifier(backbone):
        lines.append(
            f"the classifier is new: {as_timm(backbone).num_classes} classes instead of the"
            f" {as_timm(backbone).pretrained_cfg['num_classes']} of the weights"
        )
    if record := starting_record(args):
        lines += trained_before(images, args.dataset or args.data_dir, record)
    return [printable(line) for line in lines]


class FoundImages(TypedDict):
    splits: list[FoundSplit]
    read: list[str]
    """Lines of `found_lines` on how the images are read."""
    class_names: list[str]


class _Found(TypedDict):
    found: FoundImages


class FoundSettings(_Found, total=False):
    """What a run records about its images, in addition to its flags."""

    value_ranges: dict[str, list[float]]
    """Black and white by kind of images."""


def found_settings(images: ImageSplits, lines: list[str]) -> FoundSettings:
    read = lines[len(images.found) :]
    settings: FoundSettings = {
        "found": {"splits": images.found, "read": read, "class_names": images.class_names},
    }
    if images.sample.ranges:
        settings["value_ranges"] = {kind: list(found) for kind, found in images.sample.ranges.items()}
    return settings


def _why_size(images: ImageSplits, img_size: int | None, own_size: list[int], args: argparse.Namespace) -> str:
    if args.img_size:
        return "--img-size"
    if img_size not in (None, own_size[-1]):
        return f"the median image is {images.size[1]} x {images.size[0]}"
    return "the model's size"


def _why_channels(channels: int, args: argparse.Namespace) -> str:
    if args.in_chans:
        return "--in-chans"
    return "timm's default" if channels == 3 else "the model's"
