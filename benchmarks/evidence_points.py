"""The points of the grid, and which of them a method is tested at."""

from collections.abc import Callable
from itertools import islice
from typing import Any

from evidence_grid import METHODS, RECIPES, SCRATCH, SETTINGS, TEACHERS, Recipe

Row = dict[str, Any]
"""A line: what describes a run, and what was measured of it. Also the description alone."""
Complete = Callable[[list[Row]], list[Row]]
"""Gives the lines of runs, in their order."""


def find(rows: list[Row], run: Row) -> Row | None:
    """The line of a run."""
    return next((row for row in rows if run.items() <= row.items()), None)


def differences(runs: dict[int, Row], others: dict[int, Row]) -> list[float]:
    """Of the deepest exit's top-1, run by run of the same seed."""
    return [row["top1"][-1] - others[seed]["top1"][-1] for seed, row in runs.items() if seed in others]


def recipe_of(network: str) -> Recipe:
    return RECIPES.get(network, SCRATCH)


def tune(setting: str, methods: list[str], complete: Complete) -> list[Row]:
    """The point of each method that is best on the validation images, by the deepest exit's top-1 with seed 0; the
    first of equals. All have the same grid, then the recipe's change, then their own weights at the best of these.
    """
    tuned = list(dict.fromkeys(METHODS[method].like or method for method in methods))
    described = [_describe(setting, method) for method in tuned]
    best = _best([[run | point for point in recipe_of(run["network"]).grid] for run in described], complete)
    if recipe_of(described[0]["network"]).then:
        best = _best([[run, run | recipe_of(run["network"]).then] for run in best], complete)
    best = _best([[{**run, "weight": weight} for weight in METHODS[run["method"]].weights] for run in best], complete)
    points = dict(zip(tuned, best))
    return [{**points[METHODS[method].like or method], "method": method} for method in methods]


def _describe(setting: str, method: str) -> Row:
    described = {
        "phase": "tune",
        "setting": setting,
        **SETTINGS[setting]._asdict(),
        "seed": 0,
        "method": method,
        "weight": METHODS[method].weights[0],
    }
    if method == "teacher":
        if described["network"] not in TEACHERS:
            raise ValueError(
                f"{described['network']} has no larger network to teach it; evidence_grid.TEACHERS names"
                f" those of {', '.join(TEACHERS)}"
            )
        described["network"] = TEACHERS[described["network"]]
    return described


def _best(groups: list[list[Row]], complete: Complete) -> list[Row]:
    """The run of each group whose deepest exit has the highest top-1, before all that diverged."""
    rows = iter(complete([run for group in groups for run in group]))
    merits = [[("diverged" not in row, row["top1"][-1]) for row in islice(rows, len(group))] for group in groups]
    return [group[values.index(max(values))] for group, values in zip(groups, merits)]
