"""Draw docs/images/method.svg, the picture of the method: python docs/site/method_picture.py"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PATH = Path(__file__).parents[1] / "images/method.svg"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
"""Of Okabe and Ito, which colour-blind readers tell apart."""
COLUMNS = (2.6, 4.6, 6.6, 8.6)
"""Where the stages stand, and over them their heads."""
BACKBONE, HEADS, LOGITS, TEACHER = 0.9, 2.4, 3.55, 5.0


def draw(path: Path = PATH) -> None:
    """The same bytes each time, with letters as curves, so that every reader sees them alike."""
    with matplotlib.rc_context({"svg.hashsalt": "method", "svg.fonttype": "path", "font.size": 12}):
        figure = Figure(figsize=(9, 5.5))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 10), ylim=(0, 6.2))
        axes.axis("off")
        draw_backbone(axes)
        draw_exits(axes)
        draw_teacher(axes)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


def draw_backbone(axes: Axes) -> None:
    box(axes, 0.7, BACKBONE, "images", GREY, width=1.1, filled=False)
    left = 1.25
    for number, x in enumerate(COLUMNS, 1):
        arrow(axes, (left, BACKBONE), (x - 0.75, BACKBONE), GREY)
        box(axes, x, BACKBONE, f"stage {number}", BLUE)
        left = x + 0.75
    axes.text(5.6, 0.18, "backbone: the timm model, unchanged", color=BLUE, ha="center")


def draw_exits(axes: Axes) -> None:
    for number, x in enumerate(COLUMNS):
        deepest = number == len(COLUMNS) - 1
        arrow(axes, (x, BACKBONE + 0.35), (x, HEADS - 0.35), GREY)
        box(axes, x, HEADS, "classifier" if deepest else "head", BLUE if deepest else ORANGE)
        arrow(axes, (x, HEADS + 0.35), (x, LOGITS - 0.28), GREY)
        axes.text(x, LOGITS, f"logits of exit {number}", ha="center", va="center", fontsize=11)
    axes.text(9.05, 1.65, "deepest\nexit", va="center", fontsize=11, color=BLUE)


def draw_teacher(axes: Axes) -> None:
    box(axes, 5.6, TEACHER, "teacher: average of all logits (ensemble)", GREEN, width=7.5)
    for x in COLUMNS:
        arrow(axes, (x - 0.12, LOGITS + 0.25), (x - 0.12, TEACHER - 0.38), GREY)
        arrow(axes, (x + 0.12, TEACHER - 0.38), (x + 0.12, LOGITS + 0.25), GREEN, style="--")
    axes.text(5.6, 5.78, "labels and teacher train every exit", ha="center", fontsize=12)
    axes.text(0.15, 4.2, "solid: logits\ndashed: distillation", va="center", fontsize=10, color=GREY)


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.5, filled: bool = True) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.35), width, 0.7, boxstyle=style, fc=color if filled else "white", ec=color, lw=1.5
        )
    )
    axes.text(x, y, text, color="white" if filled else color, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, style: str = "-") -> None:
    properties = {"arrowstyle": "-|>", "color": color, "lw": 1.5, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=properties)


if __name__ == "__main__":
    draw()
