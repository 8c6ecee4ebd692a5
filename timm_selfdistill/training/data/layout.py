"""What the folders in a user's folder mean: splits, or classes.

A folder in it is a split if it has the name of one and holds folders with images. Otherwise each innermost folder that
holds images is a class, as in timm. Where both can be meant, nothing is guessed.
"""
import re
from collections.abc import Iterable, Iterator

from .tree import Tree

SPLIT_KINDS = {"train": "train", "training": "train", "validation": "val", "val": "val", "valid": "val", "eval": "val",
               "evaluation": "val", "test": "test"}
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
            f" the second rename {splits[0].name}/")
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
            f" (--val-split {val.name}); if they are none, rename them")


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
                f" {root.path}, training and validation images would be mixed")
        if splits == with_images:
            raise ValueError(
                f"{folder.path} holds {names_text(splits)}: as classes they would be those of all folders in"
                f" {root.path}; if they are splits, arrange them as train/{folder.name}/, ..., if they are classes,"
                " rename them")
