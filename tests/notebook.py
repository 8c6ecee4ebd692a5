"""Runs examples/quickstart.ipynb: `python -m tests.notebook` writes its outputs anew, after a change of its cells."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from .conftest import ENVIRONMENT
from .programs import ROOT

NOTEBOOK = ROOT / "examples/quickstart.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PACE = re.compile(r"  [\d,]+ images/s  left \d+:\d\d:\d\d")
"""In the line of an epoch: how fast this machine was, which another one is not."""
STYLE = re.compile(r"\x1b\[[\d;]*m")
"""Bold and italic of a terminal, which a notebook shows only where it does not show HTML."""
WITHIN_EPOCH = re.compile(r"epoch \d+/\d+  \d+/\d+  loss")
"""Begins a line of a slow machine, which shows every half minute that it is not stuck."""


def execute(folder: Path) -> Any:
    """The notebook with its outputs; its files are in `folder`, which becomes a copy of examples/ with no more than the
    notebook needs.

    Raises:
        CellExecutionError: a cell raised an exception.
    """
    (folder / "data").mkdir()
    for name in ("quickstart.ipynb", "ankle_boot.png", "data/train.parquet", "data/test.parquet"):
        shutil.copy(ROOT / "examples" / name, folder / name)
    notebook = nbformat.read(folder / NOTEBOOK.name, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", record_timing=False, coalesce_streams=True)
    client.execute(cwd=str(folder), env=ENVIRONMENT)
    return notebook


def remove_traces(notebook: Any) -> None:
    """Take out what tells of the machine and not of the product."""
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_within_epoch(output)]
            for output in cell.outputs:
                if "data" in output:
                    texts = {kind: text for kind, text in output.data.items() if kind.startswith("text/")}
                    output.data.update({kind: STYLE.sub("", PACE.sub("", text)) for kind, text in texts.items()})


def is_within_epoch(output: Any) -> bool:
    return WITHIN_EPOCH.match(output.get("data", {}).get("text/plain", "")) is not None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder))
    remove_traces(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
