"""What lies in a user's folder, found without opening a file."""
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

HIDDEN, SPECIAL = "hidden", "neither file nor folder"
LOST, LOOP = "linked to nothing", "linked to a folder above"
TABLES = (".parquet", ".arrow", ".tar", ".csv", ".jsonl")
"""Endings of files that `datasets` reads, alone or beside images."""


@dataclass
class Tree:
    """A folder with all that lies below it, without what is hidden; links are followed.

    Attributes:
        images: paths of the image files that lie in the folder itself.
        devices, inodes: of these files; equal for links to one file.
        left_out: how many of what else lies in the folder itself: endings of files, or why nothing was made of it.
        tables: paths of the files in the folder itself that `datasets` reads.
        folders: that lie in it, by name.
    """

    path: str
    name: str = ""
    images: list[str] = field(default_factory=list)
    devices: array = field(default_factory=lambda: array("Q"))
    inodes: array = field(default_factory=lambda: array("Q"))
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
    tree, about = Tree(path, name), os.stat(path)
    above |= {(about.st_dev, about.st_ino)}
    try:
        entries = os.scandir(path)
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read; change its permissions, or move it elsewhere") from error
    with entries:
        for entry in entries:
            if entry.name.startswith("."):
                tree.left_out[HIDDEN] += 1
            elif entry.is_file():
                _add_file(tree, entry, extensions, about.st_dev)
            elif entry.is_dir():
                linked = entry.stat()
                if (linked.st_dev, linked.st_ino) in above:
                    tree.left_out[LOOP] += 1
                else:
                    tree.folders.append(scan(entry.path, extensions, entry.name, above))
            else:
                tree.left_out[LOST if entry.is_symlink() else SPECIAL] += 1
    tree.folders.sort(key=lambda folder: folder.name)
    return tree


def _add_file(tree: Tree, entry: os.DirEntry, extensions: set[str], device: int) -> None:
    ending = os.path.splitext(entry.name)[1].lower()
    if ending in extensions:
        linked = entry.stat() if entry.is_symlink() else None
        tree.images.append(entry.path)
        tree.devices.append(linked.st_dev if linked else device)
        tree.inodes.append(linked.st_ino if linked else entry.inode())
    else:
        tree.left_out[ending or "without an extension"] += 1
        if ending in TABLES:
            tree.tables.append(entry.path)
