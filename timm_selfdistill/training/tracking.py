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

    A tracker that fails in the middle of a run is named in a warning and left alone from then on.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, output: Path):
        self.accelerator = accelerator
        self.trackers: list[Any] = []
        if config.report_to:
            accelerator.project_configuration.set_directories(str(output))
            accelerator.log_with = filter_trackers(list(config.report_to), accelerator.logging_dir)
            settings = {**config.to_dict(), "output": str(output)}
            accelerator.init_trackers(PROJECT, config={
                key: value for key, value in settings.items() if isinstance(value, (str, int, float))})
            self.trackers = list(accelerator.trackers) if accelerator.is_main_process else []

    def log(self, values: dict[str, float], step: int) -> None:
        for tracker in list(self.trackers):
            self._call(tracker, partial(tracker.log, values, step=step))

    def log_pictures(self, folder: Path, step: int) -> None:
        """The run's PNG files, to trackers that take pictures."""
        paths = sorted(folder.glob("*.png"))
        pictures = {path.stem: np.asarray(Image.open(path).convert("RGB"))[None] for path in paths}
        for tracker in [tracker for tracker in self.trackers if hasattr(tracker, "log_images")]:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            self._call(tracker, partial(tracker.log_images, pictures, step=step, **layout))

    def finish(self) -> None:
        for tracker in list(self.trackers):
            self._call(tracker, tracker.finish)

    def _call(self, tracker: Any, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker's own client raises
            if tracker in self.trackers:
                self.trackers.remove(tracker)
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"the tracker {tracker.name} failed and gets no more ({line})", stacklevel=3)


def memory_gib(device: torch.device) -> float:
    """Peak of the GPU where there is one, else what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
