"""Checkpoints on disk, written by a background thread, with checksums, and renamed when complete."""

import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...hub.replace import sync
from .snapshot import Snapshot

FORMAT = 1
WEIGHTS_FILE, REST_FILE, CHECKSUM_FILE = "model.safetensors", "run.pt", "checksums.json"
MEMORY_FILE = "memory.safetensors"
"""File in the checkpoints of runs whose teacher is a memory."""
LEFT = "left-"
UNWRITABLE = (OSError, SafetensorError)
"""Errors that Python and safetensors raise for a full disk."""


class Checkpoints:
    """The checkpoints of one run, on its main process.

    Args:
        folder: where each checkpoint gets a folder step-XXXXXXXX.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.writing: threading.Thread | None = None

    def write(self, snapshot: Snapshot, step: int) -> None:
        """Start writing a checkpoint, after waiting for one that is still being written.

        If it cannot be written, e.g. because the disk is full, a warning is issued and the existing checkpoints stay.
        """
        self.wait()
        if not (self.folder / _name(step)).exists():
            self.writing = threading.Thread(target=self._write, args=(snapshot, step), name="checkpoint")
            self.writing.start()

    def wait(self) -> None:
        """Wait until the checkpoint being written is on disk."""
        if self.writing:
            self.writing.join()
            self.writing = None

    @property
    def newest(self) -> Path | None:
        return next(reversed(list_checkpoints(self.folder)), None)

    def _write(self, snapshot: Snapshot, step: int) -> None:
        final, fresh = self.folder / _name(step), self.folder / f".{_name(step)}"
        try:
            if not all(bool(value.isfinite().all()) for value in snapshot.weights.values()):
                raise ValueError("its weights are not finite")
            for left in self.folder.glob(".step-*"):  # from a killed run
                shutil.rmtree(left)
            fresh.mkdir(parents=True)
            save_file(snapshot.weights, fresh / WEIGHTS_FILE)
            torch.save(snapshot.rest, fresh / REST_FILE)
            if snapshot.memory:
                save_file(snapshot.memory, fresh / MEMORY_FILE)
            _write_checksums(fresh)
            os.replace(fresh, final)
            sync(self.folder)
            for old in list_checkpoints(self.folder)[: -self.keep]:
                os.replace(old, old.with_name(f".{old.name}"))  # so that a half-removed one is never read
                shutil.rmtree(old.with_name(f".{old.name}"))
            for left in self.folder.glob(f"{LEFT}*"):
                if left.name <= f"{LEFT}{final.name}":
                    shutil.rmtree(left)
        except Exception as error:  # whatever it is, it must not end training
            shutil.rmtree(fresh, ignore_errors=True)
            warn_unwritten(final, error)

    def set_newer_aside(self, checkpoint: Path) -> None:
        """Rename the checkpoints that are newer than the resumed one, since they belong to a different history. Each is
        removed once this run has written a checkpoint as new."""
        for path in list_checkpoints(self.folder):
            if path.name > checkpoint.name:
                shutil.rmtree(path.with_name(f"{LEFT}{path.name}"), ignore_errors=True)
                os.replace(path, path.with_name(f"{LEFT}{path.name}"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def find_checkpoint(resume: str, output: str) -> Path | None:
    """Find the checkpoint to resume from. Damaged ones in a run directory are skipped with a warning.

    Args:
        resume: "latest" or "auto" for the newest checkpoint in `output`, or the path of a run directory or checkpoint.
        output: the run directory.

    Returns:
        The checkpoint; None if `resume` is "auto" and there is none.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, or all of them are.
    """
    if resume in ("latest", "auto") and not output:
        raise FileNotFoundError(f"resume={resume!r} needs the run directory as output; or set resume to its path")
    path = Path(output if resume in ("latest", "auto") else resume)
    path = path.parent if path.name == "checkpoints" else path
    if (path / CHECKSUM_FILE).is_file():
        if damage := find_damage(path):
            raise ValueError(f"{damage}; resume from another checkpoint")
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    for checkpoint in reversed(checkpoints):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        warnings.warn(f"{damage}; skipped", stacklevel=2)
    if checkpoints:
        raise ValueError(f"all {len(checkpoints)} checkpoints of {path} are damaged; start a new run")
    if resume == "auto":
        return None
    raise FileNotFoundError(f"nothing to resume: {path} is not a checkpoint and has none under checkpoints/")


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint; None if they are intact.

    Raises:
        ValueError: a newer version of the package wrote the checkpoint.
    """
    try:
        record = json.loads((checkpoint / CHECKSUM_FILE).read_text())
        own = record.pop("record")
        if own != _checksum_of(record):
            return f"{checkpoint / CHECKSUM_FILE} is damaged"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{checkpoint / CHECKSUM_FILE} is missing or damaged ({type(error).__name__})"
    if record["format"] != FORMAT:
        raise ValueError(
            f"{checkpoint} has format {record['format']}, but this version of timm-selfdistill reads format {FORMAT};"
            " install a newer version"
        )
    for name in dict.fromkeys((WEIGHTS_FILE, REST_FILE, *record["sha256"])):
        try:
            if _checksum(checkpoint / name) != record["sha256"].get(name):
                return f"{checkpoint / name} is damaged"
        except OSError as error:
            return f"{checkpoint / name} cannot be read ({error.strerror})"
    return None


def read_checkpoint(path: Path) -> Snapshot:
    """Load a checkpoint; `find_checkpoint` has verified the checksums."""
    rest: dict[str, Any] = torch.load(path / REST_FILE, map_location="cpu", weights_only=True)
    memory = path / MEMORY_FILE
    return Snapshot(load_file(path / WEIGHTS_FILE), rest, load_file(memory) if memory.exists() else None)


def read_settings(path: Path) -> dict[str, str]:
    """Load the settings of the run that wrote a checkpoint, as text, without loading its tensors."""
    return torch.load(path / REST_FILE, map_location="cpu", weights_only=True, mmap=True)["settings"]


def warn_unwritten(path: Path, error: Exception) -> None:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(
        f"{path} could not be written ({line}); the run continues, and files saved earlier are kept", stacklevel=2
    )


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _write_checksums(folder: Path) -> None:
    """Write the checksums, as the last file of a checkpoint, after the others are on disk."""
    checksums = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        checksums[path.name] = _checksum(path)
    record = folder / CHECKSUM_FILE
    content = {"format": FORMAT, "sha256": checksums}
    record.write_text(json.dumps({**content, "record": _checksum_of(content)}, indent=2))
    sync(record)
    sync(folder)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
