"""Finished runs, a line each, so that a benchmark that was stopped goes on where it was."""

import json
import warnings
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may not be there yet; a line that a kill cut short is passed over with a warning."""
    rows = []
    for line in filter(None, path.read_text().splitlines() if path.exists() else []):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            warnings.warn(f"{path}: skipped a line that was cut short: {line[:60]}", stacklevel=2)
    return rows


def append_line(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"\n{json.dumps(row)}")  # on a line of its own, also after one that was cut short
