"""Accelerate's trackers: what they log, where they write, and why they never stop a run."""

import json
import os
import secrets
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers
from PIL import Image

from ..config import TrainConfig
from .run_directory import write_atomically

PROJECT = "timm-selfdistill"
RUNS_FILE = ".trackers.json"
"""File in the run directory with each tracker's id of the run, so that a resumed run continues there."""
MLFLOW_STORE = "MLFLOW_TRACKING_URI"


class RunTrackers:
    """Starts the trackers of `config.report_to` and logs to them.

    TensorBoard, W&B and MLflow write to `output`, unless WANDB_DIR or MLFLOW_TRACKING_URI is set; Trackio writes to
    TRACKIO_DIR or its own folder. A tracker that fails during a run, or when a run is resumed, is dropped with a
    warning.

    Args:
        resumed: whether the run is resumed.

    Raises:
        RuntimeError: a tracker fails at the start of a new run.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, output: Path, resumed: bool):
        self.accelerator = accelerator
        self.trackers: list[GeneralTracker] = []
        self.own_store = MLFLOW_STORE not in os.environ and "mlflow" in config.report_to
        if self.own_store:
            os.environ[MLFLOW_STORE] = f"sqlite:///{output.resolve() / 'mlflow.db'}"
        for name in dict.fromkeys(config.report_to):
            self._start(name, config, output, resumed)

    def _start(self, name: str, config: TrainConfig, output: Path, resumed: bool) -> None:
        accelerator = self.accelerator
        run = _read_runs(output).get(name) if resumed else None
        settings = {
            key: value if isinstance(value, (str, int, float)) else str(value)
            for key, value in {**config.to_dict(), "output": str(output)}.items()
        }
        if name == "mlflow" and run:
            settings = {}  # MLflow refuses to change the parameters of a run
        try:
            accelerator.project_configuration.set_directories(str(output))
            accelerator.log_with = filter_trackers([name], accelerator.logging_dir)
            accelerator.trackers = []  # else Accelerate starts them again
            project = (config.wandb_project if name == "wandb" else None) or PROJECT
            accelerator.init_trackers(project, settings, {name: self._arguments(name, config, output, run)})
            if accelerator.is_main_process:
                self.trackers += accelerator.trackers
                _write_run(output, self.trackers[-1])
        except Exception as error:  # whatever a tracker's own client raises
            if not resumed:
                self.finish()
                raise RuntimeError(f"the tracker {name} failed to start: {_first_line(error)}") from error
            _warn(name, error)

    def _arguments(self, name: str, config: TrainConfig, output: Path, run: str | None) -> dict[str, Any]:
        """Return the arguments for a tracker's client.

        Args:
            run: the tracker's id of the run to resume; None for a new run.
        """
        if name == "wandb":
            return {
                **({} if "WANDB_DIR" in os.environ else {"dir": str(output)}),
                "name": output.name,
                "id": run,
                "resume": "allow" if run else None,
                "tags": list(config.wandb_tags) or None,
            }
        if name == "mlflow":
            folder = (output.resolve() / "mlartifacts").as_uri() if self.own_store else None
            return {"logging_dir": folder, "run_name": output.name, "run_id": run}
        if name == "trackio":
            return {
                "name": run or f"{output.name}-{secrets.token_hex(2)}",
                "resume": "allow" if run else "never",
                "embed": False,
            }
        return {}

    def log(self, values: dict[str, float], step: int) -> None:
        self._call_each(lambda tracker: tracker.log(values, step=step))

    def log_pictures(self, folder: Path, step: int) -> None:
        """Log the run's PNG files to the trackers that support images."""
        self._call_each(partial(_log_pictures, paths=sorted(folder.glob("*.png")), step=step))

    def finish(self) -> None:
        self._call_each(lambda tracker: tracker.finish())
        if self.own_store:
            os.environ.pop(MLFLOW_STORE, None)

    def _call_each(self, call: Callable[[GeneralTracker], None]) -> None:
        """Call every tracker and drop those that fail. `Accelerator.log` and `Accelerator.end_training` would stop at
        the first failure, and the latter also destroys the process group."""
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever a tracker's own client raises
                self.trackers.remove(tracker)
                _warn(tracker.name, error)


def _log_pictures(tracker: Any, paths: list[Path], step: int) -> None:
    if tracker.name == "mlflow":
        for path in paths:
            tracker.log_artifact(str(path))
    elif tracker.name == "trackio":
        import trackio

        tracker.log({path.stem: trackio.Image(path) for path in paths}, step=step)
    elif hasattr(tracker, "log_images"):
        pictures = {path.stem: np.asarray(Image.open(path).convert("RGB"))[None] for path in paths}
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(pictures, step=step, **layout)


def _read_runs(output: Path) -> dict[str, str]:
    try:
        return json.loads((output / RUNS_FILE).read_text())
    except (OSError, ValueError):
        return {}


def _write_run(output: Path, tracker: Any) -> None:
    """Store a tracker's id of the run, for trackers that can resume one."""
    names = {"wandb": lambda run: run.id, "mlflow": lambda run: run.info.run_id, "trackio": lambda run: run.name}
    if tracker.name in names:
        runs = {**_read_runs(output), tracker.name: names[tracker.name](tracker.tracker)}
        write_atomically(output / RUNS_FILE, json.dumps(runs, indent=2) + "\n")


def _warn(name: str, error: Exception) -> None:
    warnings.warn(f"the tracker {name} failed and is dropped ({_first_line(error)})", stacklevel=3)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def memory_gib(device: torch.device) -> float:
    """Return the peak memory allocated on the GPU, or without one the current memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
