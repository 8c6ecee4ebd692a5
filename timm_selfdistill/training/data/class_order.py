"""Images for a network that has classes already."""
import warnings
from os import PathLike
from pathlib import Path

from torch import nn

from ..class_names import listed, some_names
from ..preprocessing import own_class_names
from .splits import ImageSplits


def fit_classes(images: ImageSplits, backbone: nn.Module, frozen: bool) -> ImageSplits:
    """Give images the class indices of a network whose weights were loaded, whatever the order of their folders.

    Where its classifier is new, or it does not name its classes, the images keep their order; a warning says so where
    labels without names must be trusted.

    Args:
        frozen: whether the network stays as it is.

    Raises:
        ValueError: the classes of the classifier are others than those of the images.
    """
    names, new = own_class_names(backbone), has_new_classifier(backbone)
    if new and frozen:
        warnings.warn(
            f"the frozen backbone's classifier for {backbone.num_classes} classes is new, with random weights, and has"
            " nothing to teach the exits; fine-tune the network first", stacklevel=2)
    if new or names is None or not images.class_names:
        return images
    return match_classes(images, names, "give images of its classes, or --unlabelled" if frozen else
                         "to train a new classifier on its weights give --pretrained-path FILE")


def in_mapped_order(
        images: ImageSplits, class_map: str | PathLike, folder: str | PathLike | None,
        num_classes: int | None = None) -> ImageSplits:
    """Give images the class indices of a file, as `timm.data.readers.class_map` reads it.

    Args:
        class_map: a text file with the name of a class in each line, itself or in `folder`.
        num_classes: of the network, where they are more than the names; None are as many.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text file, names a class twice, or lacks one of the images'.
    """
    places = [Path(class_map), *([Path(folder) / class_map] if folder else [])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"class map {class_map} does not exist; expected a text file with a class in each line")
    if path.suffix.lower() != ".txt":
        raise ValueError(f"class map {path} must be a text file (.txt) with the name of a class in each line; pickled"
                         " ones are not read")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if len(set(names)) < len(names):
        raise ValueError(f"class map {path} names {next(name for name in names if names.count(name) > 1)!r} twice")
    if not images.class_names:
        raise ValueError(f"class map {path} orders classes, and the images have none with names; leave it out")
    if unknown := [name for name in images.class_names if name not in set(names)]:
        raise ValueError(f"class map {path} has {listed(names)}, and the images have {listed(images.class_names)}: it"
                         f" lacks {some_names(unknown)}; add them, or leave their images out")
    if num_classes is not None and num_classes < len(names):
        raise ValueError(f"class map {path} has {len(names)} classes, and num_classes is {num_classes}")
    return images.in_order([*names, *map(str, range(len(names), num_classes or 0))])


def has_new_classifier(backbone: nn.Module) -> bool:
    """Whether a network was made with a classifier of another size than that of its weights."""
    return backbone.pretrained_cfg["num_classes"] != backbone.num_classes


def match_classes(images: ImageSplits, names: list[str], way_out: str) -> ImageSplits:
    """Give images the class indices of a network by the names of its classes; numbers are taken for its indices.

    Args:
        names: of the network's classes, in its order; those of the images may be fewer.
        way_out: what to do where they are others.

    Raises:
        ValueError: the images have a class that the network does not have.
    """
    numbers = list(map(str, range(len(names))))
    if images.class_names != numbers or set(names) == set(numbers):
        return images.in_order(names, way_out)
    warnings.warn(f"the labels are numbers; they are taken for the network's classes, 0 for {names[0]!r}, 1 for"
                  f" {names[1]!r}, ...", stacklevel=3)
    return images.named(names)
