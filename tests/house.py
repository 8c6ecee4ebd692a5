"""How large the package is, and how many of its files one enters: `python -m tests.house` prints a table, and
`python -m tests.house docs/images/rooms.png` draws the rooms.

Counted are lines of code and of everything, functions longer than 60 lines, and the files and functions that the
constructor of `Trainer` and the end of an epoch enter.
"""

import ast
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import timm_selfdistill
from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, wrap_self_distill

from .test_rooms import LONGEST, ROOMS, files, imports, long_functions, room

PACKAGE = Path(timm_selfdistill.__file__).parent


def count_lines() -> tuple[int, int]:
    """Lines of code, and all lines with docstrings, comments and empty ones."""
    code = total = 0
    for path in PACKAGE.rglob("*.py"):
        lines = path.read_text().splitlines()
        texts = {
            number
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for number in range(node.lineno, node.end_lineno + 1)
        }
        total += len(lines)
        code += sum(
            1
            for number, line in enumerate(lines, 1)
            if number not in texts and line.strip() and not line.strip().startswith("#")
        )
    return code, total


@contextmanager
def entered() -> Iterator[set[tuple[str, str]]]:
    """Files and functions of the package that are called."""
    found: set[tuple[str, str]] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and not frame.f_code.co_name.startswith("<"):
            found.add((str(path.relative_to(PACKAGE)), frame.f_code.co_qualname))

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def trace_run(folder: str) -> dict[str, set[tuple[str, str]]]:
    """What is entered by the constructor of `Trainer`, and by the end of the second of three epochs."""
    model = wrap_self_distill(timm.create_model("test_resnet", num_classes=3))
    data = [(torch.rand(3, 32, 32), index % 3) for index in range(8)]
    config = TrainConfig(output=f"{folder}/run", epochs=3, batch_size=4, workers=0)
    ends: list[set[tuple[str, str]]] = []
    task = SelfDistillTask(model)
    with entered() as constructor:
        trainer = Trainer(task, data, data, config)
    finish: Callable[[], None] = trainer._finish_epoch

    def traced() -> None:
        with entered() as end:
            finish()
        ends.append(end)

    trainer._finish_epoch = traced
    trainer.fit()
    return {"Trainer.__init__": constructor, "the end of an epoch": ends[1]}


def draw_rooms(path: str) -> None:
    """A picture of the rooms, from the ground up: files, lines, and the rooms that each imports from."""
    found = files()
    rooms = [name for level in ROOMS for name in level if name and name != "training"]
    members = {name: [module for module in found if room(module) == name] for name in rooms}
    figure = Figure(figsize=(15, 0.32 * len(rooms) + 0.6), layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(rooms):
        lines = sum(len(found[module].read_text().splitlines()) for module in members[name])
        others = {room(other) for module in members[name] for other in imports(found[module])} - {name}
        axes.barh(height, lines, height=0.6, color="#88aadd" if name.startswith("training") else "#bbbbbb")
        axes.text(-60, height, name, va="center", ha="right", fontsize=9)
        counts = f"{lines:,} lines" + (f", {len(members[name])} files" if len(members[name]) > 1 else "")
        axes.text(lines + 40, height, counts, va="center", fontsize=8)
        below = sorted(other.removeprefix("training.") for other in others - {"", "training"})
        axes.text(5700, height, ", ".join(below), va="center", fontsize=8)
    axes.text(5700, len(rooms), "imports from", va="center", fontsize=9, weight="bold")
    axes.set(xlim=(-1500, 15000), ylim=(-0.7, len(rooms) + 0.7))
    axes.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    if len(sys.argv) > 1:
        draw_rooms(sys.argv[1])
        return
    table = Table("what", "count")
    code, total = count_lines()
    table.add_row("files", str(len(list(PACKAGE.rglob("*.py")))))
    table.add_row("files of training", str(len([p for p in (PACKAGE / "training").rglob("*.py") if p.name[0] != "_"])))
    table.add_row("lines of code", f"{code:,}")
    table.add_row("all lines", f"{total:,}")
    table.add_row(f"functions of more than {LONGEST} lines", str(len(long_functions())))
    with tempfile.TemporaryDirectory() as folder:
        for name, found in trace_run(folder).items():
            table.add_row(f"files that {name} enters", str(len({path for path, _ in found})))
            table.add_row(f"functions that {name} enters", str(len(found)))
    Console().print(table)


if __name__ == "__main__":
    main()
