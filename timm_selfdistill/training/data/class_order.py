"""Images for a network that has classes already."""
import warnings

from torch import nn

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
