"""The run directory and its tables, history and plots."""

import csv
import json
import os
import shutil
from contextlib import suppress
from datetime import datetime
from errno import EACCES, ENOTDIR
from functools import partial
from io import StringIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from ...hub import ExitRow
from ...pictures import create_figure, exit_style, finish, label_ends
from ..config import TrainConfig
from ..runtime.accelerator import ask_main_process
from ..state.checkpoint import find_checkpoint, list_checkpoints, warn_unwritten
from ..state.snapshot import HistoryRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIG_FILE, LAUNCH_FILE = "config.yaml", ".launch"
OWN_FOLDER = Path("output/train")
"""Parent of run directories that the user did not name."""


class EpochExits(TypedDict):
    epoch: int
    """From 1."""
    exits: list[ExitRow]


class Unlabelled(TypedDict, total=False):
    reference: str
    """"deepest" if there are no labels: accuracies are then agreement with the deepest exit."""


class RunSummary(Unlabelled):
    """Content of summary.json: the best model of a run."""

    model: str
    epoch: int
    """Epoch of the best model, from 1."""
    epochs: int
    input_size: list[int]
    """(channels, height, width)."""
    exits: list[ExitRow]
    last: EpochExits


def summary_title(summary: RunSummary) -> str:
    """Return the title for the table of a run's exits.

    Examples:
        >>> from timm_selfdistill.training import summary_title
        >>> summary_title({"model": "resnet18", "epoch": 4, "epochs": 6})
        'resnet18: epoch 4, the best of 6'
    """
    title = f"{summary['model']}: epoch {summary['epoch']}, the best of {summary['epochs']}"
    if "reference" in summary:
        title += f"; without labels, top-1 and top-5 are agreement with the {summary['reference']} exit"
    return title


def print_exits(console: Console, title: str, rows: list[ExitRow]) -> None:
    """Print a table with a row per exit: accuracy, multiply-adds, their share of the plain network, and the measured
    speed-up.

    Examples:
        >>> from rich.console import Console
        >>> from timm_selfdistill.training import print_exits
        >>> row = {"exit": 0, "module": "layer1", "top1": 83.6, "top5": 99.1, "macs": 12.1e6, "share": 0.327}
        >>> print_exits(Console(), "resnet18 on 1000 images", [row])
    """
    table = Table(title=title, title_justify="left")
    for name in ("exit", "stage", "top-1 %", "top-5 %", "MACs", "share", "speed-up"):
        table.add_column(name, justify="left" if name in ("exit", "stage") else "right")
    for row in rows:
        table.add_row(
            str(row["exit"]),
            row["module"],
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
            f"{row['macs'] / 1e6:,.1f} M",
            f"{row['share']:.1%}",
            f"{row['speedup']:.2f}x" if "speedup" in row else "",
        )
    console.print(table)


def write_atomically(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def write_history(path: Path, history: list[HistoryRow]) -> None:
    """Write history.csv, a row per epoch; cells are empty for what an epoch did not measure."""
    text = StringIO(newline="")
    columns = dict.fromkeys(name for row in history for name in row)
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, text.getvalue())


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def plot_curves(path: Path, history: list[HistoryRow], labelled: bool = True) -> None:
    """Draw curves.png: over the epochs, the validation accuracy of every exit, or without labels its agreement with the
    deepest exit, and the training loss. A dot marks the best epoch of the deepest exit."""
    from matplotlib.ticker import MaxNLocator

    figure = create_figure(8, 3.6)
    figure.subplots_adjust(left=0.08, right=0.97, top=0.91, bottom=0.14, wspace=0.6)
    accuracy, loss = figure.subplots(1, 2, width_ratios=[2, 1])
    _plot_accuracy(accuracy, [row for row in history if any(key.startswith("top1_") for key in row)])
    loss.plot([row["epoch"] for row in history], [row["train_loss"] for row in history], color="black", marker=".")
    finish(
        accuracy,
        xlabel="epoch",
        ylabel="top-1 %" if labelled else "agreement, %",
        title="validation accuracy" if labelled else "agreement with the deepest exit",
    )
    finish(loss, xlabel="epoch", title="training loss")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    fresh = path.with_name(f".{path.name}")
    figure.savefig(fresh, dpi=120, format="png")
    os.replace(fresh, path)


def _plot_accuracy(axes: "Axes", measured: list[HistoryRow]) -> None:
    """Draw the accuracy at the epochs that were validated."""
    keys = [key for key in measured[0] if key.startswith("top1_")] if measured else []
    epochs, ends = [row["epoch"] for row in measured], []
    names = [key.removeprefix("top1_").replace("_", " ") for key in keys]
    deepest = max((index for index, name in enumerate(names) if name != "ensemble"), default=None)
    for index, (key, name) in enumerate(zip(keys, names)):
        values = [row[key] for row in measured]
        style = exit_style(index, len(keys), name)
        axes.plot(epochs, values, marker=".", linewidth=2.5 if index == deepest else 1.2, **style)
        ends.append((values[-1], name, style))
        if index == deepest:
            best = max(range(len(values)), key=values.__getitem__)
            axes.plot(epochs[best], values[best], marker="o", markersize=9, color=style["color"])
            ends[-1] = (values[-1], f"{name}, best {values[best]:.2f}", style)
    if ends:
        label_ends(axes, epochs[-1], ends)


def find_resumed(config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """Find the checkpoint to resume from, the same on every process.

    Raises:
        FileNotFoundError: there is nothing to resume.
        ValueError: all checkpoints are damaged.
    """
    return ask_main_process(accelerator, partial(_find_resumed, config))


def check_run(config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> Path | None:
    """Check that `open_run` will be able to create the run directory, without writing anything.

    Args:
        checkpoint: the checkpoint to resume, if any.

    Returns:
        The run directory; None if `open_run` will choose a name.

    Raises:
        FileExistsError: the directory holds another run, or is a file.
        OSError: the directory is not writable.
    """
    return ask_main_process(accelerator, partial(_check, config, checkpoint))


def open_run(config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> Path:
    """Create the run directory, the same on every process, after checking it again as `check_run` does."""
    return ask_main_process(accelerator, partial(_claim, config, checkpoint))


def release_run(output: Path) -> None:
    """Remove the files of a new run that failed before its first checkpoint, so that a corrected run can use the same
    directory."""
    (output / CONFIG_FILE).unlink(missing_ok=True)
    shutil.rmtree(output / "last", ignore_errors=True)  # untrained
    with suppress(OSError):  # it is not empty
        output.rmdir()


def _find_resumed(config: TrainConfig) -> Path | None:
    checkpoint = find_checkpoint("auto", config.output) if _is_restarted(config) else None
    if checkpoint is None and config.resume:
        checkpoint = find_checkpoint(config.resume, config.output)
    return checkpoint


def mark_launch(output: Path) -> None:
    """Mark the run so that processes restarted by torchrun can resume it."""
    if _launch():
        write_atomically(output / LAUNCH_FILE, _launch())


def _launch() -> str:
    """Return an id shared by all processes that one torchrun starts on a machine; "" without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return "" if run_id is None else f"{run_id} {os.getppid()}"


def _is_restarted(config: TrainConfig) -> bool:
    """Whether torchrun restarted these processes after earlier ones of the same run died."""
    marker = Path(config.output) / LAUNCH_FILE
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and bool(config.output) and marker.is_file() and marker.read_text() == _launch()


def write_config(config: TrainConfig, output: Path) -> None:
    write_atomically(output / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))


def report_history(output: Path, history: list[HistoryRow], labelled: bool, picture: bool = True) -> None:
    """Write history.csv, and curves.png unless `picture` is False; a full disk only causes a warning."""
    try:
        write_history(output / "history.csv", history)
        if picture:
            plot_curves(output / "curves.png", history, labelled)
    except OSError as error:
        warn_unwritten(output, error)


def _check(config: TrainConfig, checkpoint: Path | None) -> Path | None:
    if config.output:
        output = Path(config.output)
    elif checkpoint:
        output = checkpoint.parent.parent
    else:
        _check_writable(OWN_FOLDER)
        return None
    if _resumes_here(output, checkpoint):
        return output
    if (output / CONFIG_FILE).exists() and not (_is_restarted(config) or config.resume == "auto"):
        advice = f"resume it with --resume {output}" if list_checkpoints(output / "checkpoints") else "remove it"
        raise FileExistsError(f"{output} holds another run; {advice}, or choose another output")
    _check_writable(output)
    return output


def _claim(config: TrainConfig, checkpoint: Path | None) -> Path:
    output = _check(config, checkpoint)
    try:
        if output is None:
            output = _make_new(OWN_FOLDER / datetime.now().strftime("%Y%m%d-%H%M%S"))
        output.mkdir(parents=True, exist_ok=True)
        # the config of a resumed run is replaced once its checkpoint was found to match
        if not _resumes_here(output, checkpoint):
            write_config(config, output)
    except OSError as error:
        raise _unwritable(output or OWN_FOLDER, error) from error
    return output


def _make_new(path: Path) -> Path:
    """Create a new directory; a number is appended if another run took the name in the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, numbers = path, count(2)
    while True:
        try:
            fresh.mkdir()
            return fresh
        except FileExistsError:
            fresh = path.with_name(f"{path.name}-{next(numbers)}")


def _resumes_here(output: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.parent.parent.resolve() == output.resolve()


def _check_writable(output: Path) -> None:
    """Raise OSError for a directory that could not be created or written to."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise _unwritable(output, NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(output, PermissionError(EACCES, os.strerror(EACCES)))


def _unwritable(output: Path, error: OSError) -> OSError:
    return type(error)(f"cannot write the run directory {output} ({error.strerror}); choose another output")
