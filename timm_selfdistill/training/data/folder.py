"""Folders of image files: their contents, their classes, and which of them are splits."""

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
LOST, LOOP = "broken links", "links to a parent folder"
RUN = "folders of training runs or saved models"
RUN_FILES = (("config.yaml", "last"), ("config.json", "model.safetensors"))
"""Files that mark a run directory and a saved model, whose plots are not training images."""
TABLE_ENDINGS = (".parquet", ".arrow")
SHARD_ENDINGS = (".tar",)
METADATA_FILES = ("metadata.csv", "metadata.jsonl")


class EncodedImage(TypedDict):
    """An undecoded image of `datasets`."""

    bytes: bytes | None
    path: str | None
    """Path of the file if the bytes are None, otherwise a name, if any."""


class _ImageRow(TypedDict):
    image: EncodedImage


class ImageRow(_ImageRow, total=False):
    label: int
    """Class index; missing for images without labels."""


@dataclass(repr=False)
class Tree:
    """A folder and everything below it except hidden files; links are followed.

    Attributes:
        images: paths of the image files in the folder itself.
        devices, inodes: of these files; equal for links to the same file.
        left_out: numbers of other entries in the folder itself, by file extension or by the reason they are ignored.
        tables: paths of the files in the folder itself that `datasets` reads, alone or beside images.
        folders: subfolders, sorted by name.
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
        """Iterate over the folder and all folders below it."""
        yield self
        for folder in self.folders:
            yield from folder

    @property
    def count(self) -> int:
        """Number of images in the folder and below."""
        return sum(len(folder.images) for folder in self)

    @property
    def has_images(self) -> bool:
        return any(folder.images for folder in self)

    @property
    def has_classes(self) -> bool:
        """Whether there are images in subfolders."""
        return any(folder.has_images for folder in self.folders)


def scan(path: str, extensions: set[str], name: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Tree:
    """List a folder recursively.

    Args:
        extensions: extensions of image files, in lower case.
        above: device and inode of each parent folder.

    Raises:
        PermissionError: a folder is not readable.
    """
    tree = Tree(path, name)
    try:
        about = os.stat(path)
        above |= {(about.st_dev, about.st_ino)}
        with os.scandir(path) as entries:
            for entry in entries:
                _add(tree, entry, extensions, about.st_dev, above)
    except PermissionError as error:
        if error.filename is None:  # from a subfolder, which has the message already
            raise
        raise PermissionError(f"{error.filename} is not readable; change its permissions, or move it away") from error
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
    """Call `DirEntry.is_file` or `is_dir`; return False for a link that leads to itself."""
    try:
        return question()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _add_file(tree: Tree, entry: os.DirEntry, extensions: set[str], device: int) -> None:
    extension = os.path.splitext(entry.name)[1].lower()
    if extension in extensions:
        linked = entry.stat() if entry.is_symlink() else None
        tree.images.append(entry.path)
        tree.devices.append(linked.st_dev if linked else device)
        tree.inodes.append(linked.st_ino if linked else entry.inode())
    else:
        tree.left_out[extension or "without an extension"] += 1
        if extension in (*TABLE_ENDINGS, *SHARD_ENDINGS) or entry.name in METADATA_FILES:
            tree.tables.append(entry.path)


@dataclass(frozen=True, repr=False)
class ImageFiles:
    """Image files with class indices, with rows as in `datasets` but without any conversion.

    Attributes:
        paths: paths of the files, in timm's order.
        labels: class indices (N,); None without classes.
        class_names: in the order of the indices.
        file_ids: device and inode of each file (N, 2), equal for links to the same file.
        left_out: numbers of other entries in the folder, by kind.
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
        """Return the files that are not among the others and not links to them."""
        shared = np.isin(self.file_ids[:, 1], others.file_ids[:, 1])  # same inode, possibly on another device
        if shared.any():
            taken = set(map(tuple, others.file_ids.tolist()))
            shared[shared] = [file_id in taken for file_id in map(tuple, self.file_ids[shared].tolist())]
        return self.select(np.flatnonzero(~shared)) if shared.any() else self

    @cached_property
    def table(self) -> "datasets.Dataset":
        """Paths and labels as a table in memory."""
        import datasets

        columns: dict[str, Any] = {"image": self.paths}
        features: dict[str, Any] = {"image": datasets.Image()}
        if self.labels is not None:
            columns["label"], features["label"] = self.labels, datasets.ClassLabel(names=self.class_names)
        return datasets.Dataset.from_dict(columns, datasets.Features(features))


def collect(tree: Tree, labelled: bool, class_names: list[str] | None = None) -> ImageFiles:
    """Collect the image files below a folder as timm's `ReaderImageFolder` does: the innermost folder of each is its
    class, and classes and files are in natural order. Without labels, files in the folder itself are included.

    Args:
        class_names: class names of the training images; None uses the names of the folders that hold images.

    Raises:
        ValueError: a folder is not among `class_names`, or its name cannot be printed.
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
    """Return the sort key of timm's natural order (`timm.utils.misc.natural_key`), for any name."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text.lower())]


def left_out_text(left_out: Counter[str]) -> str:
    """Return the counts as text, e.g. "9 images in test/ without a class, 24 .json"."""
    parts = sorted(left_out.items(), key=lambda part: (-part[1], part[0]))
    words = (what if count > 1 else re.sub(r"^(image|folder|link|broken link)s", r"\1", what) for what, count in parts)
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
        raise ValueError(f"{path} has a class {odd[0]!r} with unprintable characters; rename the folder")
    known = class_names or names
    unknown = [name for name in names if name not in set(known)]
    if not unknown:
        return
    alike = next((name for name in known if _plain(name) == _plain(unknown[0])), None)
    hint = f"; its name differs from {alike!a} only in case or Unicode form" if alike else ""
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
"""Split names of timm and `datasets`, in lower case, and which kind of split they stand for."""


def split_kind(name: str) -> str | None:
    """Return "train", "val" or "test"; None if the name is not that of a split."""
    return SPLIT_KINDS.get(name.lower())


def find_splits(root: Tree, named: tuple[str, ...] = ()) -> dict[str, Tree]:
    """Return the folders that are splits, by name, including those without class folders; empty if they are classes.

    Args:
        named: split names given by the user, in addition to `SPLIT_KINDS`.

    Raises:
        ValueError: the folders could be either splits or classes.
    """
    with_images = [folder for folder in root.folders if folder.has_images]
    candidates = [folder for folder in with_images if split_kind(folder.name) or folder.name in named]
    others = [folder for folder in with_images if folder not in candidates]
    splits = [folder for folder in candidates if folder.has_classes]
    if not _are_both(splits, named):
        _refuse_likely_splits(root.path, with_images)
    if others and splits and not _are_both(splits, named):
        raise ValueError(
            f"{root.path} is ambiguous: either {names_text(splits)} is a split and {names_text(others)} not part of it,"
            f" or {names_text([*splits, *others])} are classes; in the first case give {splits[0].path} itself, in the"
            f" second rename {splits[0].name}/"
        )
    if others and not splits:
        candidates = []  # a class named "train"
    if not candidates:
        _refuse_splits_below(root)
    return {folder.name: folder for folder in candidates}


def pick_split(splits: Iterable[str], name: str, named: bool) -> str | None:
    """Return the split with this name or another name of the same kind ("val" for "validation"), as in timm; None if
    there is none.

    Args:
        named: whether the user gave the name, so that an exact match is not ambiguous.

    Raises:
        ValueError: there are several splits of that kind.
    """
    splits = list(splits)
    if name in splits and named:
        return name
    kind = split_kind(name)
    found = [split for split in splits if split == name or (kind and split_kind(split) == kind)]
    if len(found) > 1:
        flag = "train_split (--train-split)" if kind == "train" else "val_split (--val-split)"
        raise ValueError(f"both {names_text(found)} can be the split {name!r}; remove one, or choose one with {flag}")
    return found[0] if found else None


def val_splits(splits: Iterable[str]) -> Iterator[str]:
    """Yield the splits that can be used for validation, in order of preference: validation, then test."""
    splits = list(splits)
    for kind in ("val", "test"):
        if (split := pick_split(splits, kind, named=False)) is not None:
            yield split


def names_text(folders: Iterable[Tree | str]) -> str:
    """Return folder names as text, e.g. "train/ and val/"."""
    names = [folder if isinstance(folder, str) else folder.name for folder in folders]
    shown = [f"{name}/" for name in names[:4]] + ["..."] * (len(names) > 4)
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else shown[0]


def _are_both(folders: list[Tree], named: tuple[str, ...] = ()) -> bool:
    """Whether there are both a split for training and one for validation."""
    kinds = {split_kind(folder.name) for folder in folders} - {None}
    return len(set(named) & {folder.name for folder in folders}) == 2 or {"train"} < kinds


def _refuse_likely_splits(path: str, folders: list[Tree]) -> None:
    """Raise ValueError if folders with the same classes are named like a training and a validation split."""
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
            f"{path} is ambiguous: {names_text([train, val])} hold the same classes, such as {min(shared)!r}, and may"
            f" be splits; if so, set train_split (--train-split {train.name}) and val_split (--val-split {val.name});"
            " if not, rename them"
        )


def _refuse_splits_below(root: Tree) -> None:
    """Raise ValueError if folders that would be read as classes, or that hold classes, are named like splits."""
    for folder in root:
        if folder is root:
            continue
        with_images = [part for part in folder.folders if part.has_images]
        splits = [part for part in with_images if split_kind(part.name)]
        if not _are_both(splits):
            continue
        if any(part.has_classes for part in splits):
            raise ValueError(
                f"{folder.path} holds the splits {names_text(splits)}: give that folder instead of {root.path}, where"
                " training and validation images would be mixed"
            )
        if splits == with_images:
            raise ValueError(
                f"{folder.path} holds {names_text(splits)}, which would be read as classes of {root.path}; if they are"
                f" splits, arrange them as train/{folder.name}/, ..., if they are classes, rename them"
            )
