"""One style for all pictures: colors that color-blind readers tell apart, intervals, labels at the ends of lines."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""Of Okabe and Ito: the exits, the ensemble, early exit, and one more. The plain network is black."""
SERIES = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00", "black", "#999999")
"""Of models or classes in one picture, in this order."""


def create_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches, whose text can be read where it is shown 600 pixels wide."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def finish(axes: "Axes", **labels: Any) -> None:
    """Set the labels, the size of all text, and the grid."""
    axes.set(**labels)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_fontsize(11)
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def accuracy_interval(top1: float, images: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of an accuracy, both in per cent, which was measured on so many images."""
    z, share = NormalDist().inv_cdf(0.975), top1 / 100
    center = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return min(top1, 100 * (center - half)), max(top1, 100 * (center + half))  # of 0 and 100 % despite rounding


def exit_style(index: int, count: int, name: str) -> dict[str, Any]:
    """Return the look of a line of an exit among `count` rows, in every picture the same: the deeper, the darker."""
    if name == "ensemble":
        return {"color": ORANGE, "linestyle": "--"}
    return {"color": BLUE, "alpha": 0.35 + 0.65 * index / max(1, count - 2)}


def label_ends(axes: "Axes", x: float, ends: Sequence[tuple[float, str, dict[str, Any]]]) -> None:
    """Write names at the right ends of lines, moved apart where they would overlap.

    Args:
        x: of the ends, in data units.
        ends: of each line its last value, its name and its style.
    """
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    gap = 12 / height * (high - low)
    placed: list[float] = []
    ordered = sorted(ends, key=lambda end: end[0])
    for value, _, _ in ordered:
        placed.append(value if not placed else max(value, placed[-1] + gap))
    moved = max(0.0, placed[-1] - high) if placed else 0.0
    for position, (_, name, style) in zip(placed, ordered):
        axes.annotate(
            name,
            (x, position - moved),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=style["color"],
            annotation_clip=False,
        )
