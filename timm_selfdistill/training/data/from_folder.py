"""Training and validation images from folders of image files."""
import warnings
from collections import Counter
from dataclasses import replace

from .files import ImageFiles, collect
from .found import Found, entry
from .fraction import ValFraction
from .layout import split_kind, val_splits
from .sources import Reading, Source
from .tree import Tree


def find_in_folder(source: Source, reading: Reading, fraction: ValFraction, num_classes: int | None) -> Found:
    """Both, with the classes of the training images.

    Raises:
        ValueError: there are no folders of classes, fewer than two, or others for validation than for training.
    """
    labelled = not reading.unlabelled
    name = source.find_split(reading.train_split, named=reading.train_split != "train")
    tree = source.splits[name]
    if labelled:
        check_has_classes(tree)
    train = collect(tree, labelled)
    if labelled:
        train = replace(train, class_names=_classes(train.class_names, num_classes, tree.path))
    val_name = _val_split(source, reading, name)
    if val_name == name:
        raise same_split(val_name)
    others = Counter({f"images in {other}/": part.count for other, part in source.splits.items()
                      if other not in (name, val_name) and (part.has_classes or not labelled)})
    sampled = train
    if val_name is None:
        train, val = _divide(tree, train, labelled, fraction)
        val_name, val_path = fraction.of(name), tree.path
    else:
        val_tree = source.splits[val_name]
        val, val_path = _collect_val(val_tree, train if labelled else None), val_tree.path
    train = _without_shared(train, val)
    return Found(
        train, val, sampled, val_name, "image", None if val.labels is None else "label", val.class_names,
        [entry(name, len(train), len(train.classes_with_images) if labelled else 0, tree.path,
               train.left_out + source.left_out + others),
         entry(val_name, len(val), len(val.classes_with_images), val_path, val.left_out)])


def check_has_classes(tree: Tree, trains: bool = True) -> None:
    """Raise ValueError for a folder of images without folders of classes."""
    if tree.has_classes:
        return
    way_out = f"; if {tree.name}/ itself is a class, rename it" if split_kind(tree.name) else ""
    if trains:
        way_out += "; to learn from a frozen network alone, without labels, give unlabelled (--unlabelled)"
    raise ValueError(
        f"{tree.path} holds {tree.count} images, but no folders of classes; expected one folder with images per class,"
        f" at least 2, or a metadata.csv with a column file_name and one of classes (--target-key){way_out}")


def same_split(name: str) -> ValueError:
    return ValueError(f"the validation split {name!r} is what is trained on; name another one, or none to take"
                      " val_fraction (--val-fraction) of the training images")


def _val_split(source: Source, reading: Reading, train_name: str) -> str | None:
    """The validation split; None without any that has folders of classes."""
    if reading.val_split is not None:
        return source.find_split(reading.val_split)
    return next(val_splits(name for name, tree in source.splits.items()
                           if name != train_name and (tree.has_classes or reading.unlabelled)), None)


def _divide(tree: Tree, train: ImageFiles, labelled: bool, fraction: ValFraction) -> tuple[ImageFiles, ImageFiles]:
    whole = train if labelled else collect(tree, _is_labelled(tree))
    kept, held_out = fraction.draw(whole.labels if labelled else None, len(whole), whole.class_names)
    return whole.select(kept), replace(whole.select(held_out), left_out=Counter())


def _collect_val(tree: Tree, train: ImageFiles | None) -> ImageFiles:
    """Validation images, of the classes of the training images; without these, of their own, if all have one."""
    if train is None:
        return collect(tree, _is_labelled(tree))
    check_has_classes(tree)
    return collect(tree, True, train.class_names)


def _is_labelled(tree: Tree) -> bool:
    return tree.has_classes and not tree.images


def _classes(names: list[str], num_classes: int | None, path: str) -> list[str]:
    """The names of the classes, and of those that the network has beside them.

    Raises:
        ValueError: there are too few or too many.
    """
    if len(names) < 2:
        raise ValueError(f"the training images of {path} are of one class only ({names}); 2 are needed")
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(f"num_classes is {num_classes}, but {path} has {len(names)} classes: {names[:5]}")
    return [*names, *map(str, range(len(names), num_classes or 0))]


def _without_shared(train: ImageFiles, val: ImageFiles) -> ImageFiles:
    """Training images that are not validation images, too; links to one file are one image.

    Raises:
        ValueError: what is left is of fewer classes.
    """
    kept = train.without(val)
    shared = len(train) - len(kept)
    if not shared:
        return train
    if not len(kept):
        raise ValueError(f"all {shared} training images are validation images, too")
    if lost := sorted(set(train.classes_with_images) - set(kept.classes_with_images)):
        raise ValueError(f"all training images of class {lost[0]!r} are validation images, too, or links to them")
    warnings.warn(f"{shared} of the training images are validation images, too, or links to them: they are not trained"
                  " on", stacklevel=5)
    return replace(kept, left_out=kept.left_out + Counter({"that are validation images, too": shared}))
