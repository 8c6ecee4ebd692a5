"""What lies in a user's folder, found without opening a file."""
import errno
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

HIDDEN, SPECIAL = "hidden", "neither file nor folder"
LOST, LOOP = "linked to nothing", "linked to a folder above"
RUN = "folders of training runs or saved models"
RUN_FILES = (("config.yaml", "last"), ("config.json", "model.safetensors"))
"""What makes a folder a run directory, and a saved model, whose pictures are no images to train on."""
TABLE_ENDINGS = (".parquet", ".arrow")
SHARD_ENDINGS = (".tar",)
METADATA_FILES = ("metadata.csv", "metadata.jsonl")


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
