"""Images for a network that has classes already."""
import warnings

from torch import nn

from ..preprocessing import own_class_names
from .splits import ImageSplits, some_names


def fit_classes(images: ImageSplits, backbone: nn.Module, frozen: bool) -> ImageSplits:
    """Give images the class indices of a network whose weights were loaded, whatever the order of their folders.

    Where its classifier is new, or it does not name its classes, the images keep their order; a warning says so where
    labels without names must be trusted.

    Args:
        frozen: whether the network stays as it is.

    Raises:
        ValueError: the classes of the classifier are others than those of the images.
    """
    names, new = own_class_names(backbone), backbone.pretrained_cfg["num_classes"] != backbone.num_classes
    if new and frozen:
        warnings.warn(
            f"the frozen backbone's classifier for {backbone.num_classes} classes is new, with random weights, and has"
            " nothing to teach the exits; fine-tune the network first", stacklevel=2)
    if new or names is None or not images.class_names or names == images.class_names:
        return images
    if images.class_names == list(map(str, range(len(names)))):
        warnings.warn(f"the labels are numbers; they are taken for the network's classes, 0 for {names[0]!r}, 1 for"
                      f" {names[1]!r}, ...", stacklevel=2)
        return images.named(names)
    if set(names) != set(images.class_names):
        way_out = ("give images of its classes, or --unlabelled" if frozen else
                   "to train a new classifier on its weights give --pretrained-path FILE")
        raise ValueError(f"the network's classifier is for the classes {some_names(names)}, the images are of"
                         f" {some_names(images.class_names)}, and both are {len(names)}; {way_out}")
    return images.in_order(names)
