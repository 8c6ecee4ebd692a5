"""Several files of a folder replaced as one."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

COMPLETE, UNFINISHED = ".saved", ".saving-"
STALE_SECONDS = 3600


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A fresh folder, whose files take the place of those of the same name in `folder` when the block ends well.

    Whenever the process dies or the power fails, `folder` holds all the old files or all the new ones: the fresh folder
    is brought to disk and gets its final name in one step, and from then on `finish_replacing`, with which every
    reading begins, does what is left. Plain timm does not call it: between two of these renamings it sees old weights
    beside a new config or the reverse, which differ in nothing that it reads as long as they describe the same network.

    Raises:
        FileExistsError: `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a model is saved to a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{UNFINISHED}*"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:  # younger ones may be another process's
            shutil.rmtree(left, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
    try:
        yield fresh
        finish_replacing(folder)
        for path in (*fresh.iterdir(), fresh):
            sync(path)
        os.rename(fresh, folder / COMPLETE)
        finish_replacing(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder where the file system can do that, are on disk."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():  # Windows does not open folders
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finish_replacing(folder: Path) -> None:
    """Move the files that a killed process had saved, but not yet moved, to their places.

    Only files: a link could lead out of a folder that somebody else made.
    """
    complete = folder / COMPLETE
    if complete.is_symlink() or not complete.is_dir():
        return
    with suppress(FileNotFoundError):  # another process is doing the same
        for path in complete.iterdir():
            if path.is_symlink() or not path.is_file():
                return
            os.replace(path, folder / path.name)
        complete.rmdir()
