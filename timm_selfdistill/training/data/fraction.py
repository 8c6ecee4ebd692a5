"""A part of the training images, taken for validation."""
import math
from dataclasses import dataclass

import numpy as np
from datasets.utils.stratify import stratified_shuffle_split_generate_indices


@dataclass(frozen=True)
class ValFraction:
    """How large it is, and the seed by which it is drawn.

    Raises:
        ValueError: the share does not lie between 0 and 1.
    """

    share: float = 0.1
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.share}")

    def draw(self, labels: np.ndarray | None, count: int, class_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of training and validation images, the same as those of `datasets.Dataset.train_test_split`.

        Args:
            labels: (N,), class indices, by which they are drawn class by class where there is room for each class;
                None without.
            count: N.

        Raises:
            ValueError: a class has one image only, or none is left to train on.
        """
        held_out, draw = math.ceil(self.share * count), np.random.default_rng(self.seed)
        if held_out >= count:
            raise ValueError(
                f"val_fraction {self.share:g} of {count} images leaves none to train on; take less, or give a"
                " validation split")
        if labels is not None:
            classes, counts = np.unique(labels, return_counts=True)
            if counts.min() < 2:
                raise ValueError(
                    f"class {class_names[classes[counts.argmin()]]!r} has one image, which cannot be both trained on"
                    " and measured: add images of it, or a validation split")
            if min(count - held_out, held_out) >= len(classes):
                return next(stratified_shuffle_split_generate_indices(labels, count - held_out, held_out, rng=draw))
        order = draw.permutation(count)
        if labels is not None and (lost := set(classes) - set(labels[order[held_out:]])):
            raise ValueError(
                f"val_fraction {self.share:g} of {count} images has no room for each of {len(classes)} classes, and"
                f" takes all images of class {class_names[min(lost)]!r}; take more, or give a validation split")
        return order[held_out:], order[:held_out]

    def of(self, split: str) -> str:
        """What the part is called."""
        return f"{self.share:g} of {split}"
