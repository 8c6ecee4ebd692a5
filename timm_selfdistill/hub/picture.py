"""exits.png: accuracy over multiply-adds, an exit a point."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from .records import CurvePoint, ExitRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_exits(
    path: Path,
    model: str,
    rows: list[ExitRow],
    curve: Sequence[CurvePoint] = (),
    calibrated: ExitRow | None = None,
    baseline: ExitRow | None = None,
    agreement: bool = False,
) -> None:
    """Draw the rows, each with exit, module, top1 (per cent), macs and share.

    Args:
        curve: further points, top1 and macs, of early exit.
        calibrated: the point of the thresholds that are saved with the model.
        baseline: the same network trained without exits.
        agreement: top1 tells how often an exit agrees with the deepest, not with labels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    _plot_rows(axes, rows)
    _plot_early_exit(axes, curve, calibrated)
    if baseline:
        axes.scatter(
            baseline["macs"] / 1e6,
            baseline["top1"],
            s=80,
            color="black",
            marker="x",
            zorder=4,
            label=f"plain network, trained alone: {baseline['top1']:.2f} %",
        )
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), fontsize=9, frameon=False)
    axes.set(
        xlabel="multiply-adds per image, millions",
        xlim=(0, None),
        ylabel="agreement with the deepest exit, %" if agreement else "top-1 %",
        title=f"{model}: {'agreement' if agreement else 'accuracy'} over compute",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _plot_rows(axes: "Axes", rows: list[ExitRow]) -> None:
    line = [row for row in rows if row["exit"] != "ensemble"]
    axes.plot([row["macs"] / 1e6 for row in line], [row["top1"] for row in line], color="tab:blue", alpha=0.4, zorder=1)
    for index, row in enumerate(rows):
        ensemble = row["exit"] == "ensemble"
        style = exit_style(index, len(rows), str(row["exit"]))
        label = "ensemble" if ensemble else f"exit {row['exit']} ({row['module']})" if row["module"] else "plain"
        axes.scatter(
            row["macs"] / 1e6,
            row["top1"],
            s=120 if ensemble else 60,
            color=style["color"],
            alpha=style.get("alpha"),
            marker="*" if ensemble else "o",
            zorder=2,
            label=f"{label}: {row['top1']:.2f} %, {row['share']:.0%} of the compute",
        )


def _plot_early_exit(axes: "Axes", curve: Sequence[CurvePoint], calibrated: ExitRow | None) -> None:
    if curve:
        axes.plot(
            [point["macs"] / 1e6 for point in curve],
            [point["top1"] for point in curve],
            color="tab:green",
            marker=".",
            label="early exit, one threshold for all exits",
            zorder=3,
        )
    if calibrated:
        axes.scatter(
            calibrated["macs"] / 1e6,
            calibrated["top1"],
            s=80,
            color="tab:green",
            marker="D",
            zorder=4,
            label=f"early exit, calibrated: {calibrated['top1']:.2f} %, {calibrated['share']:.0%}",
        )


class _Style(TypedDict):
    color: str


class ExitStyle(_Style, total=False):
    """Arguments of matplotlib."""

    alpha: float
    linestyle: str


def exit_style(index: int, count: int, name: str) -> ExitStyle:
    """The look of an exit among `count` rows, in every picture the same."""
    if name == "ensemble":
        return {"color": "tab:orange", "linestyle": "--"}
    return {"color": "tab:blue", "alpha": 0.35 + 0.65 * index / max(1, count - 2)}
