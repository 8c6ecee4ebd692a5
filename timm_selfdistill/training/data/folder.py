"""Folders of image files: what lies in them, their classes, and which of them are splits."""

import errno
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

if TYPE_CHECKING:
    import datasets

HIDDEN, SPECIAL = "hidden", "neither file nor folder"
LOST, LOOP = "linked to nothing", "linked to a folder above"
RUN = "folders of training runs or saved models"
RUN_FILES = (("config.yaml", "last"), ("config.json", "model.safetensors"))
"""What makes a folder a run directory, and a saved model, whose pictures are no images to train on."""
TABLE_ENDINGS = (".parquet", ".arrow")
SHARD_ENDINGS = (".tar",)
METADATA_FILES = ("metadata.csv", "metadata.jsonl")


class EncodedImage(TypedDict):
    """An undecoded image of `datasets`."""

    bytes: bytes | None
    path: str | None
    """Where the bytes are None, of the file; else a name, if any."""


class _ImageRow(TypedDict):
    image: EncodedImage


class ImageRow(_ImageRow, total=False):
    label: int
    """Class index; left out of images without labels."""


@dataclass(repr=False)
class Tree:
    """A folder with all that lies below it, without what is hidden; links are followed.

    Attributes:
        images: paths of the image files that lie in the folder itself.
        devices, inodes: of these files; equal for links to one file.
        left_out: how many of what else lies in the folder itself: endings of files, or why nothing was made of it.
        tables: paths of the files in the folder itself that `datasets` reads, alone or beside images.
        folders: that lie in it, by name.
    """

    path: str
    name: str = ""
    images: list[str] = field(default_factory=list)
    devices: "array[int]" = field(default_factory=lambda: array("Q"))
    inodes: "array[int]" = field(default_factory=lambda: array("Q"))
    left_out: Counter[str] = field(default_factory=Counter)
    tables: list[str] = field(default_factory=list)
    folders: list["Tree"] = field(default_factory=list)

    def __iter__(self) -> Iterator["Tree"]:
        """The folder, and all below it."""
        yield self
        for folder in self.folders:
            yield from folder

    @property
    def count(self) -> int:
        """Of the images in it and below it."""
        return sum(len(folder.images) for folder in self)

    @property
    def has_images(self) -> bool:
        return any(folder.images for folder in self)

    @property
    def has_classes(self) -> bool:
        """Whether there are images in folders below it."""
        return any(folder.has_images for folder in self.folders)


def scan(path: str, extensions: set[str], name: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Tree:
    """List a folder.

    Args:
        extensions: of image files, in small letters.
        above: device and inode of each folder that this one lies in.

    Raises:
        PermissionError: a folder may not be read.
    """
    tree = Tree(path, name)
    try:
        about = os.stat(path)
        above |= {(about.st_dev, about.st_ino)}
        with os.scandir(path) as entries:
            for entry in entries:
                _add(tree, entry, extensions, about.st_dev, above)
    except PermissionError as error:
        if error.filename is None:  # of a folder below, said already
            raise
        raise PermissionError(f"{error.filename} may not be read; change its permissions, or move it away") from error
    tree.folders.sort(key=lambda folder: folder.name)
    return tree


def _add(tree: Tree, entry: os.DirEntry, extensions: set[str], device: int, above: frozenset[tuple[int, int]]) -> None:
    if entry.name.startswith("."):
        tree.left_out[HIDDEN] += 1
    elif _is(entry.is_file):
        _add_file(tree, entry, extensions, device)
    elif _is(entry.is_dir):
        linked = entry.stat()
        if any(all(os.path.exists(os.path.join(entry.path, file)) for file in files) for files in RUN_FILES):
            tree.left_out[RUN] += 1
        elif (linked.st_dev, linked.st_ino) in above:
            tree.left_out[LOOP] += 1
        else:
            tree.folders.append(scan(entry.path, extensions, entry.name, above))
    else:
        tree.left_out[LOST if entry.is_symlink() else SPECIAL] += 1


def _is(question: Callable[[], bool]) -> bool:
    """`DirEntry.is_file` or `is_dir`; a link that leads to itself is neither."""
    try:
        return question()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _add_file(tree: Tree, entry: os.DirEntry, extensions: set[str], device: int) -> None:
    ending = os.path.splitext(entry.name)[1].lower()
    if ending in extensions:
        linked = entry.stat() if entry.is_symlink() else None
        tree.images.append(entry.path)
        tree.devices.append(linked.st_dev if linked else device)
        tree.inodes.append(linked.st_ino if linked else entry.inode())
    else:
        tree.left_out[ending or "without an extension"] += 1
        if ending in (*TABLE_ENDINGS, *SHARD_ENDINGS) or entry.name in METADATA_FILES:
            tree.tables.append(entry.path)


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

    def __getitem__(self, index: int) -> ImageRow:
        row: ImageRow = {"image": {"bytes": None, "path": self.paths[index]}}
        return row if self.labels is None else {**row, "label": int(self.labels[index])}

    @property
    def classes_with_images(self) -> list[str]:
        return [] if self.labels is None else [self.class_names[label] for label in np.unique(self.labels)]

    def select(self, indices: np.ndarray) -> "ImageFiles":
        labels = None if self.labels is None else self.labels[indices]
        return replace(
            self, paths=[self.paths[index] for index in indices], labels=labels, file_ids=self.file_ids[indices]
        )

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
    order = np.array(
        sorted(range(len(paths)), key=lambda index: natural_key(paths[index][len(tree.path) :])), dtype=int
    )
    labels = np.repeat([indices[folder.name] for folder in folders], [len(folder.images) for folder in folders])
    files = ImageFiles(
        paths, labels.astype(np.int64) if labelled else None, names if labelled else [], _file_ids(folders)
    )
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
    return np.stack(
        [np.concatenate([folder.devices for folder in folders]), np.concatenate([folder.inodes for folder in folders])],
        axis=1,
    )


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
    known = class_names or names
    unknown = [name for name in names if name not in set(known)]
    if not unknown:
        return
    alike = next((name for name in known if _plain(name) == _plain(unknown[0])), None)
    hint = f"; its name differs from {alike!a} only in case or in how letters are written" if alike else ""
    shown = ascii(unknown[0]) if alike else repr(unknown[0])
    raise ValueError(
        f"{path} has images of class {shown}, which is not among the {len(known)} classes of the training images:"
        f" {', '.join(map(repr, known[:5]))}{hint}"
    )


SPLIT_KINDS = {
    "train": "train",
    "training": "train",
    "validation": "val",
    "val": "val",
    "valid": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
}
"""Names of splits, timm's and those of `datasets`, in any case; and which split it is."""


def split_kind(name: str) -> str | None:
    """ "train", "val", "test", or None for a name of no split."""
    return SPLIT_KINDS.get(name.lower())


def find_splits(root: Tree, named: tuple[str, ...] = ()) -> dict[str, Tree]:
    """The folders that are splits, by name, also those that hold images without folders; none where they are classes.

    Args:
        named: names of splits that a user has given, in addition to `SPLIT_KINDS`.

    Raises:
        ValueError: the folders can be splits as well as classes.
    """
    with_images = [folder for folder in root.folders if folder.has_images]
    candidates = [folder for folder in with_images if split_kind(folder.name) or folder.name in named]
    others = [folder for folder in with_images if folder not in candidates]
    splits = [folder for folder in candidates if folder.has_classes]
    if not _are_both(splits, named):
        _refuse_likely_splits(root.path, with_images)
    if others and splits and not _are_both(splits, named):
        raise ValueError(
            f"{root.path} can be read in two ways: {names_text(splits)} is a split and {names_text(others)} no part of"
            f" it, or {names_text([*splits, *others])} are classes; in the first case give {splits[0].path} itself, in"
            f" the second rename {splits[0].name}/"
        )
    if others and not splits:
        candidates = []  # a class called "train"
    if not candidates:
        _refuse_splits_below(root)
    return {folder.name: folder for folder in candidates}


def pick_split(splits: Iterable[str], name: str, named: bool) -> str | None:
    """The split of a name, or of another name of the same kind ("val" for "validation"), as in timm; None without any.

    Args:
        named: whether it was named by hand, so that others of its kind are no question.

    Raises:
        ValueError: there are several of that kind.
    """
    splits = list(splits)
    if name in splits and named:
        return name
    kind = split_kind(name)
    found = [split for split in splits if split == name or (kind and split_kind(split) == kind)]
    if len(found) > 1:
        flag = "train_split (--train-split)" if kind == "train" else "val_split (--val-split)"
        raise ValueError(f"both {names_text(found)} can be the split {name!r}; remove one, or name one with {flag}")
    return found[0] if found else None


def val_splits(splits: Iterable[str]) -> Iterator[str]:
    """What can be measured on, the first choice first: the validation split, the test split."""
    splits = list(splits)
    for kind in ("val", "test"):
        if (split := pick_split(splits, kind, named=False)) is not None:
            yield split


def names_text(folders: Iterable[Tree | str]) -> str:
    """For example "train/ and val/"."""
    names = [folder if isinstance(folder, str) else folder.name for folder in folders]
    shown = [f"{name}/" for name in names[:4]] + ["..."] * (len(names) > 4)
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else shown[0]


def _are_both(folders: list[Tree], named: tuple[str, ...] = ()) -> bool:
    """Whether there is a split to train on and one to measure on."""
    kinds = {split_kind(folder.name) for folder in folders} - {None}
    return len(set(named) & {folder.name for folder in folders}) == 2 or {"train"} < kinds


def _refuse_likely_splits(path: str, folders: list[Tree]) -> None:
    """Raise ValueError where folders with the same classes have words for both kinds of splits in their names."""
    likely: dict[str, Tree] = {}
    for folder in folders:
        words = {split_kind(word) for word in re.findall("[a-z]+", folder.name.lower())} - {None}
        if folder.has_classes and len(words) == 1:
            likely.setdefault("train" if words == {"train"} else "val", folder)
    if len(likely) < 2:
        return
    train, val = (likely[kind] for kind in ("train", "val"))
    shared = {part.name for part in train if part.images} & {part.name for part in val if part.images}
    if shared:
        raise ValueError(
            f"{path} can be read in two ways: {names_text([train, val])} hold the same classes, such as"
            f" {min(shared)!r}, and may be splits; then give train_split (--train-split {train.name}) and val_split"
            f" (--val-split {val.name}); if they are none, rename them"
        )


def _refuse_splits_below(root: Tree) -> None:
    """Raise ValueError where folders that are to be classes, or hold classes, are splits themselves."""
    for folder in root:
        if folder is root:
            continue
        with_images = [part for part in folder.folders if part.has_images]
        splits = [part for part in with_images if split_kind(part.name)]
        if not _are_both(splits):
            continue
        if any(part.has_classes for part in splits):
            raise ValueError(
                f"{folder.path} holds the splits {names_text(splits)}: give that folder; read as classes of"
                f" {root.path}, training and validation images would be mixed"
            )
        if splits == with_images:
            raise ValueError(
                f"{folder.path} holds {names_text(splits)}: as classes they would be those of all folders in"
                f" {root.path}; if they are splits, arrange them as train/{folder.name}/, ..., if they are classes,"
                " rename them"
            )
