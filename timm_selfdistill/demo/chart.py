"""Accuracy over compute as coordinates of a drawing, for the page's template."""

from dataclasses import dataclass
from math import ceil, floor, log10, sqrt

from ..hub import ExitRow
from .recorded import Recorded

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 12, 40
"""Margins for the labels of the axes."""
SIGMAS = 1.96
"""Half-width of a 95 % confidence interval, in standard errors."""


@dataclass(frozen=True)
class Point:
    """A classifier in the drawing.

    Attributes:
        label: "0", "1", ...; "E" for the ensemble.
        x, y: its centre.
        low, high: ends of its interval, as y; None where the number of images is not known.
    """

    label: str
    x: float
    y: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Chart:
    """A drawing of `WIDTH` x `HEIGHT`, x to the right and y downwards.

    Attributes:
        x_ticks, y_ticks: position and label.
        curve: "x,y x,y ..." of early exit; empty where there is none.
        calibrated: centre of the saved thresholds' point.
    """

    points: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curve: str
    calibrated: tuple[float, float] | None


class _Scale:
    """From values to positions."""

    def __init__(self, values: tuple[float, float], positions: tuple[float, float]):
        self.low, self.high = values
        self.first, self.last = positions

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return round(self.first + part * (self.last - self.first), 1)

    def ticks(self, step: float) -> list[tuple[float, str]]:
        values = (number * step for number in range(ceil(self.low / step), floor(self.high / step) + 1))
        return [(self(value), f"{value:g}") for value in values]


def draw_chart(recorded: Recorded) -> Chart | None:
    """None where no accuracy is recorded."""
    rows = [row for row in recorded.rows if {"top1", "macs"} <= row.keys()]
    if not rows:
        return None
    intervals = [_interval(row["top1"], recorded.images) for row in rows]
    others = [*recorded.curve, *([recorded.calibrated] if recorded.calibrated else [])]
    macs = [row["macs"] for row in rows] + [point["macs"] for point in others]
    top1 = [end for interval in intervals for end in interval] + [point["top1"] for point in others]
    margin = 0.06 * (max(top1) - min(top1)) or 1.0
    x = _Scale((0, 1.06 * max(macs) / 1e6), (LEFT, WIDTH - RIGHT))
    y = _Scale((min(top1) - margin, min(100.0, max(top1)) + margin), (HEIGHT - BOTTOM, TOP))
    return Chart(
        [_point(row, interval, x, y, recorded.images is not None) for row, interval in zip(rows, intervals)],
        x.ticks(_step(x.high)),
        [tick for tick in y.ticks(_step(y.high - y.low)) if float(tick[1]) <= 100],
        " ".join(f"{x(point['macs'] / 1e6)},{y(point['top1'])}" for point in recorded.curve),
        (x(recorded.calibrated["macs"] / 1e6), y(recorded.calibrated["top1"])) if recorded.calibrated else None,
    )


def _point(row: ExitRow, interval: tuple[float, float], x: _Scale, y: _Scale, known: bool) -> Point:
    low, high = (y(end) if known else None for end in interval)
    label = "E" if row["exit"] == "ensemble" else str(row["exit"])
    return Point(label, x(row["macs"] / 1e6), y(row["top1"]), low, high)


def _interval(top1: float, images: int | None) -> tuple[float, float]:
    """Ends of the 95 % interval of an accuracy, by the number of images alone."""
    part = top1 / 100
    error = SIGMAS * 100 * sqrt(max(0.0, part * (1 - part)) / images) if images else 0.0
    return max(0.0, top1 - error), min(100.0, top1 + error)


def _step(length: float) -> float:
    """Between ticks: 1, 2 or 5 times a power of ten, for three to six of them."""
    power = 10.0 ** floor(log10(length / 4))
    return next(step * power for step in (1, 2, 5, 10) if length / (step * power) <= 6)
