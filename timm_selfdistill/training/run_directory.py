"""The run directory: who owns it, and what lies in it."""
import os
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from .accelerator import ask_main_process
from .checkpoint import find_checkpoint, list_checkpoints, warn_unwritten
from .config import TrainConfig
from .report import plot_curves, write_atomically, write_history

CONFIG_FILE, LAUNCH_FILE = "config.yaml", ".launch"


def find_resumed(config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """The checkpoint that a run goes on from, the same on every process.

    Raises:
        FileNotFoundError: there is nothing to resume.
        ValueError: all there is to resume is damaged.
    """
    return ask_main_process(accelerator, partial(_find_resumed, config))


def open_run(config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> Path:
    """The run directory, the same on every process.

    Args:
        checkpoint: that is resumed.

    Raises:
        FileExistsError: the directory holds another run, or is a file.
        OSError: it cannot be written.
    """
    return ask_main_process(accelerator, partial(_claim, config, checkpoint))


def _find_resumed(config: TrainConfig) -> Path | None:
    checkpoint = find_checkpoint("auto", config.output) if _is_restarted(config) else None
    if checkpoint is None and config.resume:
        checkpoint = find_checkpoint(config.resume, config.output)
    return checkpoint


def mark_launch(output: Path) -> None:
    """Let this run be gone on with by the processes that torchrun starts in place of these, should one die."""
    if _launch():
        write_atomically(output / LAUNCH_FILE, _launch())


def _launch() -> str:
    """What all processes have in common that one torchrun starts on a machine; "" without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return "" if run_id is None else f"{run_id} {os.getppid()}"


def _is_restarted(config: TrainConfig) -> bool:
    """Whether torchrun started these processes in the place of others, whose run this was."""
    marker = Path(config.output) / LAUNCH_FILE
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and bool(config.output) and marker.is_file() and marker.read_text() == _launch()


def write_config(config: TrainConfig, output: Path) -> None:
    write_atomically(output / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))


def report_history(output: Path, history: list[dict[str, Any]], labelled: bool, picture: bool = True) -> None:
    """history.csv, and curves.png unless `picture` is False; a disk that is full is no reason to end the run."""
    try:
        write_history(output / "history.csv", history)
        if picture:
            plot_curves(output / "curves.png", history, labelled)
    except OSError as error:
        warn_unwritten(output, error)


def _claim(config: TrainConfig, checkpoint: Path | None) -> Path:
    if config.output:
        output = Path(config.output)
    elif checkpoint:
        output = checkpoint.parent.parent
    else:
        output = Path("output/train") / datetime.now().strftime("%Y%m%d-%H%M%S")
    resumed_here = checkpoint is not None and checkpoint.parent.parent.resolve() == output.resolve()
    if (output / CONFIG_FILE).exists() and not (resumed_here or _is_restarted(config) or config.resume == "auto"):
        go_on = f"go on with --resume {output}" if list_checkpoints(output / "checkpoints") else "remove it"
        raise FileExistsError(f"{output} holds another run; {go_on}, or choose another output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not resumed_here:  # a resumed run's is replaced once its checkpoint was seen to fit
            write_config(config, output)
    except OSError as error:
        raise OSError(f"cannot write the run directory {output} ({error.strerror}); choose another output") from error
    return output
