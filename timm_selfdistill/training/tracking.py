"""Accelerate's trackers: what they are told, and that they never stop a run."""
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from PIL import Image

from .config import TrainConfig

PROJECT = "timm-selfdistill"


class RunTrackers:
    """The trackers of `config.report_to`, started; those that write files write into `output`.

    A tracker that fails in the middle of a run, or when one is resumed, is named in a warning and left alone from then
    on.

    Args:
        resumed: whether this is the start of a run that goes on.

    Raises:
        Exception: a tracker fails at the start of a new run; whatever its client raises.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, output: Path, resumed: bool):
        self.accelerator = accelerator
        self.trackers: list[Any] = []
        for name in config.report_to:
            self._start(name, config, output, resumed)

    def _start(self, name: str, config: TrainConfig, output: Path, resumed: bool) -> None:
        accelerator, settings = self.accelerator, {**config.to_dict(), "output": str(output)}
        try:
            accelerator.project_configuration.set_directories(str(output))
            accelerator.log_with = filter_trackers([name], accelerator.logging_dir)
            accelerator.init_trackers(PROJECT, config={
                key: value for key, value in settings.items() if isinstance(value, (str, int, float))})
            self.trackers += accelerator.trackers if accelerator.is_main_process else []
        except Exception as error:  # whatever a tracker's own client raises
            if not resumed:
                raise
            _warn(name, error)

    def log(self, values: dict[str, float], step: int) -> None:
        for tracker in list(self.trackers):
            self._call(tracker, partial(tracker.log, values, step=step))

    def log_pictures(self, folder: Path, step: int) -> None:
        """The run's PNG files, to trackers that take pictures."""
        for tracker in [tracker for tracker in self.trackers if hasattr(tracker, "log_images")]:
            self._call(tracker, partial(_log_pictures, tracker, folder, step))

    def finish(self) -> None:
        for tracker in list(self.trackers):
            self._call(tracker, tracker.finish)

    def _call(self, tracker: Any, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker's own client raises
            if tracker in self.trackers:
                self.trackers.remove(tracker)
            _warn(tracker.name, error)


def _log_pictures(tracker: Any, folder: Path, step: int) -> None:
    pictures = {path.stem: np.asarray(Image.open(path).convert("RGB"))[None] for path in sorted(folder.glob("*.png"))}
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images(pictures, step=step, **layout)


def _warn(name: str, error: Exception) -> None:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(f"the tracker {name} failed and gets no more ({line})", stacklevel=3)


def memory_gib(device: torch.device) -> float:
    """Peak of the GPU where there is one, else what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
