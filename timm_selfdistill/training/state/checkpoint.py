"""Checkpoints on disk: written beside by a thread, with checksums, and renamed; the newest kept."""

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
"""In the checkpoints of runs with a memory of answers."""
LEFT = "left-"
UNWRITABLE = (OSError, SafetensorError)
"""A full disk, as Python and safetensors tell it."""


class Checkpoints:
    """The checkpoints of one run, on its main process.

    Args:
        folder: gets a folder step-XXXXXXXX for each.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.writing: threading.Thread | None = None

    def write(self, snapshot: Snapshot, step: int) -> None:
        """Begin to write; a checkpoint that is still being written is waited for first.

        Where it cannot be written, a full disk say, there is a warning, and those that are there stay.
        """
        self.wait()
        if not (self.folder / _name(step)).exists():
            self.writing = threading.Thread(target=self._write, args=(snapshot, step), name="checkpoint")
            self.writing.start()

    def wait(self) -> None:
        """Until what was begun is on disk."""
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
            for left in self.folder.glob(".step-*"):  # by a run that was killed
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
                os.replace(old, old.with_name(f".{old.name}"))  # so that half of one is never taken for a whole
                shutil.rmtree(old.with_name(f".{old.name}"))
            for left in self.folder.glob(f"{LEFT}*"):
                if left.name <= f"{LEFT}{final.name}":
                    shutil.rmtree(left)
        except Exception as error:  # whatever it is, training must not end for it; it is told
            shutil.rmtree(fresh, ignore_errors=True)
            warn_unwritten(final, error)

    def set_newer_aside(self, checkpoint: Path) -> None:
        """Rename the checkpoints that follow the resumed one: they belong to a history that this run leaves. They are
        removed as the new one overtakes them."""
        for path in list_checkpoints(self.folder):
            if path.name > checkpoint.name:
                shutil.rmtree(path.with_name(f"{LEFT}{path.name}"), ignore_errors=True)
                os.replace(path, path.with_name(f"{LEFT}{path.name}"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Those that were written to the end, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def find_checkpoint(resume: str, output: str) -> Path | None:
    """The checkpoint that `resume` means: the newest whole one in `output` ("latest", or "auto", where there may be
    none), or in a run directory, or a checkpoint. Damaged ones are passed over with a warning.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or all are.
    """
    if resume in ("latest", "auto") and not output:
        raise FileNotFoundError(f"resume={resume!r} needs the run directory as output; or give resume its path")
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
        warnings.warn(f"{damage}; passed over", stacklevel=2)
    if checkpoints:
        raise ValueError(f"all {len(checkpoints)} checkpoints of {path} are damaged; start a new run")
    if resume == "auto":
        return None
    raise FileNotFoundError(f"nothing to resume: {path} is no checkpoint and holds none under checkpoints/")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint.

    Raises:
        ValueError: a newer version of the package wrote it.
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
            f"{checkpoint} has format {record['format']}, this version of timm-selfdistill reads {FORMAT}; install a"
            " newer one"
        )
    for name in dict.fromkeys((WEIGHTS_FILE, REST_FILE, *record["sha256"])):
        try:
            if _checksum(checkpoint / name) != record["sha256"].get(name):
                return f"{checkpoint / name} is damaged"
        except OSError as error:
            return f"{checkpoint / name} cannot be read ({error.strerror})"
    return None


def read_checkpoint(path: Path) -> Snapshot:
    """What `Checkpoints.write` wrote; `find_checkpoint` has looked at the checksums."""
    rest: dict[str, Any] = torch.load(path / REST_FILE, map_location="cpu", weights_only=True)
    memory = path / MEMORY_FILE
    return Snapshot(load_file(path / WEIGHTS_FILE), rest, load_file(memory) if memory.exists() else None)


def read_settings(path: Path) -> dict[str, str]:
    """The settings of the run that wrote a checkpoint, as text; its tensors stay on disk."""
    return torch.load(path / REST_FILE, map_location="cpu", weights_only=True, mmap=True)["settings"]


def warn_unwritten(path: Path, error: Exception) -> None:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(f"{path} could not be written ({line}); the run goes on, what was saved before stays", stacklevel=2)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _write_checksums(folder: Path) -> None:
    """Last of all, of files that are on disk."""
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
