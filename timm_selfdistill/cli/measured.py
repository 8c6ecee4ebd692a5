"""Choosing the images on which a command evaluates a saved model."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from ..training import ImageSplits, load_images
from ..training.data.finding import load_split
from ..training.data.folder import split_kind
from ..training.data.images import ValueRange, ValueRanges
from ..training.data.sources import ValFraction
from .record import Record, as_range


class Reading(TypedDict):
    """Arguments of `load_images` and `load_split` for reading a source."""

    name: str | None
    image_column: str | None
    label_column: str | None
    value_range: ValueRange | ValueRanges | None


@dataclass(frozen=True)
class Choice:
    """The images to evaluate on.

    Attributes:
        source: folder, file or dataset on the Hub.
        owns: whether the run trained on images of this source; None if unknown.
        split: name of the split that is evaluated as a whole; None if a part of the training split is drawn, or the
            split is found automatically.
        fraction: the part that is drawn; None if none is.
    """

    source: str
    owns: bool | None
    split: str | None
    fraction: ValFraction | None


def find_images(
    args: argparse.Namespace, record: Record, others: Sequence[Record] = ()
) -> tuple[ImageSplits, list[str]]:
    """Load the images for the flags of `add_image_flags`; missing flags are taken from the run.

    Args:
        others: records of further models to be evaluated on the same images.

    Returns:
        Images, whose validation part is to be evaluated, and lines that describe them, starting with warnings about
        images that were trained on.

    Raises:
        FileNotFoundError: no images are given, and those of the run are unknown or no longer exist.
        ValueError: the run's images have changed, so it is unknown which were trained on; or as in `load_images`.
    """
    choice = _choose(args, record)
    images = _load(choice, args, record)
    notes = []
    undivided = not choice.owns and choice.split is None and choice.fraction is None
    if undivided and record.fraction and record.images and len(images.val_rows) == sum(record.images):
        moved = replace(choice, owns=True, fraction=record.fraction)
        drawn = _load(moved, args, record)
        if drawn.source["drawn_from"] == record.drawn_from:
            choice, images = moved, drawn
            notes.append(
                f"{choice.source} seems to contain the {sum(record.images)} images of the run; only those held out from"
                " training are evaluated"
            )
    notes += trained_on(choice, record, images.source["split"])
    for other in others:
        owns = other.source is not None and _is_same(choice.source, other.source)
        notes += trained_on(replace(choice, owns=owns), other, images.source["split"])
    if choice.owns and (choice.fraction, choice.split) == (record.fraction, record.val_split):
        notes = _trained_before(record) + notes
    if choice.owns:
        notes += _check_counts(choice, images, record) + _say_changed(args, record)
    return images, [*notes, images.lines()[-1]]


def _trained_before(record: Record) -> list[str]:
    """Return the lines of `trained_before` in the record of a run."""
    found = record.settings.get("found")
    lines = found.get("read") if isinstance(found, dict) else None
    return [line for line in lines if str(line).startswith("warning: ")] if isinstance(lines, list) else []


def _choose(args: argparse.Namespace, record: Record) -> Choice:
    if args.dataset and args.data_dir:
        raise ValueError(f"--data-dir {args.data_dir} and --dataset {args.dataset} exclude each other; leave one out")
    given = args.dataset or args.data_dir
    source = given or record.source
    if source is None:
        raise FileNotFoundError(
            f"{record.model} does not record the images of its run; give --data-dir FOLDER or --dataset NAME"
        )
    if given is None and record.text("data_dir") == source and not record.text("dataset") and not Path(source).exists():
        raise FileNotFoundError(
            f"{source}, the images of the run of {record.model}, does not exist; give --data-dir FOLDER"
        )
    owns = None if record.source is None else _is_same(source, record.source)
    drawing = _drawing_flags(args)
    if args.val_split is not None:
        if drawing:
            raise ValueError(
                f"--val-split {args.val_split} evaluates a whole split, but {drawing} a part drawn from the training"
                " split; leave one out"
            )
        return Choice(source, owns, args.val_split, None)
    if not drawing and not (owns and record.fraction):
        return Choice(source, owns, record.val_split if owns else None, None)
    own = record.fraction or ValFraction()
    share = own.share if args.val_fraction is None else args.val_fraction
    return Choice(source, owns, None, ValFraction(share, own.seed if args.seed is None else args.seed))


def _drawing_flags(args: argparse.Namespace) -> str:
    """Return the given flags that control how validation images are drawn, as text."""
    names = ("train_split", "val_fraction", "seed")
    return " ".join(
        f"--{name.replace('_', '-')} {value}" for name in names if (value := getattr(args, name)) is not None
    )


def _load(choice: Choice, args: argparse.Namespace, record: Record) -> ImageSplits:
    columns: Reading = {
        "name": args.dataset_config or (record.dataset_config if choice.owns else None),
        "image_column": args.input_key or (record.text("input_key") if choice.owns else None),
        "label_column": args.target_key or (record.text("target_key") if choice.owns else None),
        "value_range": as_range(args.value_range) or record.value_range,
    }
    if choice.fraction is None:
        return load_split(choice.source, choice.split, **columns)
    classes = record.settings.get("num_classes") if choice.owns else None
    images = load_images(
        choice.source,
        train_split=args.train_split or record.train_split,
        val_fraction=choice.fraction.share,
        seed=choice.fraction.seed,
        num_classes=classes if isinstance(classes, int) else None,
        unlabelled=choice.owns is True and record.settings.get("unlabelled") is True,
        **columns,
    )
    if "val_fraction" not in images.source:
        split = images.source["split"]
        drawing = _drawing_flags(args) or f"the run's --val-fraction {choice.fraction.share:g}"
        raise ValueError(
            f"{choice.source} has a validation split, {split}, so {drawing} has no effect; give --val-split {split}"
            + (" alone" if _drawing_flags(args) else "")
        )
    if images.label_column is None:
        raise ValueError(
            f"the images in {choice.source} have no labels to measure accuracy with; give others with --data-dir FOLDER"
        )
    return images


def _say_changed(args: argparse.Namespace, record: Record) -> list[str]:
    """Return a line if flags change how images are read, compared with the run."""
    own = {
        "train_split": record.train_split,
        "dataset_config": record.dataset_config,
        "input_key": record.text("input_key"),
        "target_key": record.text("target_key"),
        "value_range": record.settings.get("value_range"),
    }
    changed = [
        f"--{name.replace('_', '-')} {as_text(given)} instead of {as_text(own[name]) or 'none'}"
        for name in own
        if (given := getattr(args, name)) is not None and given != own[name]
    ]
    return [f"images are read with {', '.join(changed)} in the run"] if changed else []


def as_text(value: Any) -> str:
    """Return a setting as text; empty for None."""
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{part:g}" for part in value)
    return "" if value is None else str(value)


def trained_on(choice: Choice, record: Record, measured: str) -> list[str]:
    """Return a warning if a run trained on some of the images, or may have.

    Args:
        measured: the split to be evaluated, "train" for a source without splits.
    """
    of_train = choice.fraction is not None or split_kind(measured) == "train" or measured == record.train_split
    if not of_train or (choice.owns and choice.fraction is not None and choice.fraction == record.fraction):
        return []
    if not choice.owns:
        named = f" in {record.source}" if record.source else ""
        count = f"{record.images[0]} images{named}" if record.images else f"images{named or ' that it does not record'}"
        return [f"warning: {record.model} may have been trained on these images; its run used {count}"]
    held_out = f"the run was validated on the {record.dataset.get('split', 'validation split')}"
    if record.fraction:
        held_out += f", drawn with seed {record.fraction.seed}"
    share = f"{1 - record.fraction.share:.0%}" if record.fraction else "all"
    if choice.fraction is None:
        return [
            f"warning: {record.model} was trained on {share} of these images, since {measured} is its training"
            f" split; {held_out}"
        ]
    return [
        f"warning: {record.model} was trained on about {share} of these images, drawn with --val-fraction"
        f" {choice.fraction.share:g} --seed {choice.fraction.seed}; {held_out}"
    ]


def trained_before(images: ImageSplits, source: str, record: Record) -> list[str]:
    """Return a warning if a run validates on images that its initial weights were trained on.

    Args:
        source: folder, file or dataset on the Hub with the run's images.
        record: record of the model that provides the weights.
    """
    if record.source is None or not _is_same(source, record.source):
        return []
    drawn, split = images.source, images.source["split"]
    fraction = ValFraction(drawn["val_fraction"], drawn["seed"]) if "val_fraction" in drawn else None
    return trained_on(Choice(source, True, None if fraction else split, fraction), record, split)


def _check_counts(choice: Choice, images: ImageSplits, record: Record) -> list[str]:
    """Return a warning if the number of images in a validation split has changed since the run.

    Raises:
        ValueError: the images that the validation part was drawn from have changed.
    """
    if record.images is None:
        return []
    if choice.fraction is not None and record.fraction is not None:
        count = len(images.train_rows) + len(images.val_rows)
        if count != sum(record.images):
            raise ValueError(
                f"{choice.source} has {count} images, but had {sum(record.images)} when {record.model} was trained, so"
                " the part held out by the run cannot be drawn again; give other images with --data-dir, or evaluate on"
                f" all of these with --val-split {record.train_split}"
            )
        if record.drawn_from not in (None, images.source["drawn_from"]):
            raise ValueError(
                f"names or labels of the images in {choice.source} have changed since {record.model} was trained, so"
                " the part held out by the run cannot be drawn again; restore the images, give others with --data-dir,"
                f" or evaluate on all of these with --val-split {record.train_split}"
            )
    elif choice.split == record.val_split and len(images.val_rows) != record.images[1]:
        return [
            f"warning: the split {choice.split} has {len(images.val_rows)} images, but had {record.images[1]} when"
            f" {record.model} was trained"
        ]
    return []


def _is_same(source: str, other: str) -> bool:
    if Path(source).exists() and Path(other).exists():
        return Path(source).samefile(other)
    return source == other
