"""What a run leaves behind for people: tables, history, pictures."""
import csv
import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..hub import exit_style


def summary_title(summary: dict[str, Any]) -> str:
    """What stands over the table of a run's exits."""
    title = f"{summary['model']}: epoch {summary['epoch']}, the best of {summary['epochs']}"
    if "reference" in summary:
        title += f"; without labels, top-1 and top-5 tell how often an exit agrees with the {summary['reference']}"
    return title


def print_exits(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """A row per exit: accuracy, multiply-adds, share of the plain network's, measured speed-up
    where it is no noise."""
    table = Table(title=title, title_justify="left")
    for name in ("exit", "stage", "top-1 %", "top-5 %", "MACs", "share", "speed-up"):
        table.add_column(name, justify="left" if name in ("exit", "stage") else "right")
    for row in rows:
        table.add_row(
            str(row["exit"]), row["module"], f"{row['top1']:.2f}", f"{row['top5']:.2f}", f"{row['macs'] / 1e6:,.1f} M",
            f"{row['share']:.1%}", f"{row['speedup']:.2f}x" if "speedup" in row else "",
        )
    console.print(table)


def write_atomically(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """history.csv: a row an epoch; what only some epochs have is a column, too."""
    text = StringIO(newline="")
    columns = dict.fromkeys(name for row in history for name in row)
    writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, text.getvalue())


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def plot_curves(path: Path, history: list[dict[str, Any]], labelled: bool = True) -> None:
    """curves.png: training loss, and validation accuracy of every exit, or without labels its agreement with the
    deepest, over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    measured = [row for row in history if any(key.startswith("top1_") for key in row)]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in history], marker=".", color="black")
    loss.set(xlabel="epoch", ylabel="training loss", title="training loss")
    keys = [key for key in measured[0] if key.startswith("top1_")] if measured else []
    for index, key in enumerate(keys):
        name = key.removeprefix("top1_").replace("_", " ")
        style = exit_style(index, len(keys), name)
        accuracy.plot([row["epoch"] for row in measured], [row[key] for row in measured], marker=".", label=name,
                      **style)
    accuracy.set(xlabel="epoch", ylabel="top-1 %",
                 title="validation accuracy" if labelled else "agreement with the deepest exit")
    if keys:
        accuracy.legend()
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    fresh = path.with_name(f".{path.name}")
    figure.savefig(fresh, dpi=120, format="png")
    os.replace(fresh, path)
