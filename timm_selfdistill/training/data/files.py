"""Image files and their classes."""
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .tree import Tree

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, repr=False)
class ImageFiles:
    """Image files with class indices; a row for each, as `datasets` has them, but nothing is converted.

    Attributes:
        paths: of the files, in timm's order.
        labels: (N,), class indices; None without classes.
        class_names: in the order of the indices.
        file_ids: (N, 2), device and inode of each file, equal for links to one file.
        left_out: how many of what else lay there.
    """

    paths: list[str]
    labels: np.ndarray | None
    class_names: list[str]
    file_ids: np.ndarray
    left_out: Counter[str] = field(default_factory=Counter)

    def __repr__(self) -> str:
        return f"ImageFiles({len(self)} images, {len(self.class_names)} classes)"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"image": {"bytes": None, "path": self.paths[index]}}
        return row if self.labels is None else {**row, "label": int(self.labels[index])}

    @property
    def classes_with_images(self) -> list[str]:
        return [] if self.labels is None else [self.class_names[label] for label in np.unique(self.labels)]

    def select(self, indices: np.ndarray) -> "ImageFiles":
        labels = None if self.labels is None else self.labels[indices]
        return replace(
            self, paths=[self.paths[index] for index in indices], labels=labels, file_ids=self.file_ids[indices])

    def without(self, others: "ImageFiles") -> "ImageFiles":
        """Those of the files that are none of the others, nor links to them."""
        shared = np.isin(self.file_ids[:, 1], others.file_ids[:, 1])  # the same inode, perhaps of another device
        if shared.any():
            taken = set(map(tuple, others.file_ids.tolist()))
            shared[shared] = [file_id in taken for file_id in map(tuple, self.file_ids[shared].tolist())]
        return self.select(np.flatnonzero(~shared)) if shared.any() else self

    @cached_property
    def table(self) -> "datasets.Dataset":
        """The paths and labels as a table in memory."""
        import datasets

        columns: dict[str, Any] = {"image": self.paths}
        features: dict[str, Any] = {"image": datasets.Image()}
        if self.labels is not None:
            columns["label"], features["label"] = self.labels, datasets.ClassLabel(names=self.class_names)
        return datasets.Dataset.from_dict(columns, datasets.Features(features))


def collect(tree: Tree, labelled: bool, class_names: list[str] | None = None) -> ImageFiles:
    """The image files below a folder as timm's `ReaderImageFolder` has them: the innermost folder of each is its class,
    and classes and files are in natural order. Without labels, files that lie in the folder itself count, too.

    Args:
        class_names: of the training images; None are those of the folders, each of which has an image.

    Raises:
        ValueError: a folder is none of `class_names`, or has a name that cannot be printed.
    """
    folders = [folder for folder in tree if folder.images and not (labelled and folder is tree)]
    names = sorted({folder.name for folder in folders}, key=lambda name: (natural_key(name), name))
    if labelled:
        _check_names(names, class_names, tree.path)
        names = class_names or names
    indices = {name: index for index, name in enumerate(names)}
    paths = [path for folder in folders for path in folder.images]
    order = np.array(sorted(range(len(paths)), key=lambda index: natural_key(paths[index][len(tree.path):])), dtype=int)
    labels = np.repeat([indices[folder.name] for folder in folders], [len(folder.images) for folder in folders])
    files = ImageFiles(
        paths, labels.astype(np.int64) if labelled else None, names if labelled else [], _file_ids(folders))
    return replace(files.select(order), left_out=_left_out(tree, labelled))


def natural_key(text: str) -> list[str | int]:
    """timm's order of names (`timm.utils.misc.natural_key`), for any name."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def left_out_text(left_out: Counter[str]) -> str:
    """For example "9 images in test/ without a class, 24 .json"."""
    parts = sorted(left_out.items(), key=lambda part: (-part[1], part[0]))
    words = (what if count > 1 else re.sub(r"^(image|folder)s", r"\1", what) for what, count in parts)
    return ", ".join(f"{count} {what}" for (_, count), what in zip(parts, words))


def _file_ids(folders: list[Tree]) -> np.ndarray:
    if not folders:
        return np.empty((0, 2), np.uint64)
    return np.stack([np.concatenate([folder.devices for folder in folders]),
                     np.concatenate([folder.inodes for folder in folders])], axis=1)


def _left_out(tree: Tree, labelled: bool) -> Counter[str]:
    total: Counter[str] = Counter()
    if labelled and tree.images:
        total[f"images in {os.path.basename(tree.path)}/ itself"] += len(tree.images)
    for folder in tree:
        total += folder.left_out
        if folder is not tree and not folder.has_images:
            total["folders without an image"] += 1
    return total


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _check_names(names: list[str], class_names: list[str] | None, path: str) -> None:
    if odd := [name for name in names if not name.isprintable()]:
        raise ValueError(f"{path} has a class {odd[0]!r}, whose name cannot be printed; rename the folder")
    unknown = [name for name in names if name not in set(class_names or names)]
    if not unknown:
        return
    alike = next((name for name in class_names if _plain(name) == _plain(unknown[0])), None)
    hint = f"; its name differs from {alike!a} only in case or in how letters are written" if alike else ""
    shown = ascii(unknown[0]) if alike else repr(unknown[0])
    raise ValueError(
        f"{path} has images of class {shown}, which is not among the {len(class_names)} classes of the training images:"
        f" {', '.join(map(repr, class_names[:5]))}{hint}")
