"""Draw docs/images/method.svg, the picture of the method: python docs/site/method_picture.py"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PATH = Path(__file__).parents[1] / "images/method.svg"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
"""Of Okabe and Ito, which colour-blind readers tell apart."""
ROWS = (4.05, 3.0, 1.95, 0.9)
"""Where the stages stand, and beside them their heads."""
STAGES, HEADS, EXITS, TEACHER = 0.85, 2.5, 3.6, 4.8


def draw(path: Path = PATH) -> None:
    """The same bytes each time, with letters as curves, so that every reader sees them alike."""
    with matplotlib.rc_context({"svg.hashsalt": "method", "svg.fonttype": "path", "font.size": 11}):
        figure = Figure(figsize=(5.4, 5.4))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 5.4), ylim=(0, 5.4))
        axes.axis("off")
        draw_backbone(axes)
        draw_exits(axes)
        draw_teacher(axes)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


def draw_backbone(axes: Axes) -> None:
    axes.text(STAGES, 5.1, "images", ha="center", va="center", color=GREY)
    top = 4.95
    for number, y in enumerate(ROWS, 1):
        arrow(axes, (STAGES, top), (STAGES, y + 0.27), GREY)
        box(axes, STAGES, y, 1.3, f"stage {number}", BLUE)
        top = y - 0.27
    axes.text(STAGES, 0.22, "backbone:\nthe timm model", ha="center", va="center", color=BLUE, fontsize=10)


def draw_exits(axes: Axes) -> None:
    for number, y in enumerate(ROWS):
        deepest = number == len(ROWS) - 1
        arrow(axes, (STAGES + 0.65, y), (HEADS - 0.5, y), GREY)
        box(axes, HEADS, y, 1.0, "classifier" if deepest else "head", BLUE if deepest else ORANGE)
        arrow(axes, (HEADS + 0.5, y), (EXITS - 0.28, y), GREY)
        axes.text(EXITS, y, f"exit {number}", ha="center", va="center")
    axes.text(EXITS, ROWS[-1] - 0.42, "deepest exit", ha="center", va="center", color=BLUE, fontsize=10)


def draw_teacher(axes: Axes) -> None:
    middle, height = (ROWS[0] + ROWS[-1]) / 2, ROWS[0] - ROWS[-1] + 0.54
    box(axes, TEACHER, middle, 0.75, "teacher:\naverage of all exits", GREEN, height, rotation=90)
    for y in ROWS:
        arrow(axes, (EXITS + 0.28, y + 0.09), (TEACHER - 0.375, y + 0.09), GREY)
        arrow(axes, (TEACHER - 0.375, y - 0.09), (EXITS + 0.28, y - 0.09), GREEN, style="--")
    axes.text(3.85, 5.05, "labels train every exit,\nand the teacher (dashed)", ha="center", va="center", color=GREY)


def box(
    axes: Axes, x: float, y: float, width: float, text: str, color: str, height: float = 0.54, rotation: int = 0
) -> None:
    corner = (x - width / 2, y - height / 2)
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec=color)
    axes.add_patch(shape)
    axes.text(x, y, text, color="white", ha="center", va="center", rotation=rotation)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, style: str = "-") -> None:
    properties = {"arrowstyle": "-|>", "color": color, "lw": 1.4, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=properties)


if __name__ == "__main__":
    draw()
