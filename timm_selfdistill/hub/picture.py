"""exits.png: accuracy over multiply-adds, an exit a point."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pictures import BLUE, GREEN, ORANGE, accuracy_interval, create_figure, finish
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
    images: int | None = None,
) -> None:
    """Draw the rows, each with exit, module, top1 (per cent), macs and share.

    Args:
        curve: further points, top1 and macs, of early exit.
        calibrated: the point of the thresholds that are saved with the model.
        baseline: the same network trained without exits.
        agreement: top1 tells how often an exit agrees with the deepest, not with labels.
        images: that top1 was measured on; gives every point its 95 % interval.
    """
    lines = len(rows) + bool(curve) + bool(calibrated) + bool(baseline) + 1
    height = 4.2 + 0.22 * lines
    figure = create_figure(7, height)
    figure.subplots_adjust(left=0.11, right=0.97, top=1 - 0.4 / height, bottom=(0.75 + 0.22 * lines) / height)
    axes = figure.subplots()
    exits = [row for row in rows if row["exit"] != "ensemble"]
    if len(exits) > 1:
        axes.plot([row["macs"] / 1e6 for row in exits], [row["top1"] for row in exits], color=BLUE, alpha=0.4, zorder=1)
        axes.axhline(exits[-1]["top1"], color="black", linewidth=1, linestyle=":", label=_plain(exits[-1]), zorder=0)
    for row in rows:
        _plot_row(axes, row, images)
    _plot_early_exit(axes, curve, calibrated, images)
    if baseline:
        label = f"plain network, trained alone: {baseline['top1']:.2f} %"
        _plot_point(axes, baseline, images, label, color="black", marker="X")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.5 / (height - 1.15 - 0.22 * lines)), fontsize=10, frameon=False)
    intervals = f", 95 % intervals from {images:,} images" if images else ""
    finish(
        axes,
        xlabel="multiply-adds per image, millions",
        xlim=(0, None),
        ylabel="agreement with the deepest exit, %" if agreement else "top-1 %",
        title=f"{model}{intervals}",
    )
    figure.savefig(path, dpi=120)


def _plain(deepest: ExitRow) -> str:
    return f"deepest exit, the plain network at inference: {deepest['top1']:.2f} %"


def _plot_row(axes: "Axes", row: ExitRow, images: int | None) -> None:
    ensemble = row["exit"] == "ensemble"
    name = "ensemble" if ensemble else f"exit {row['exit']} ({row['module']})" if row["module"] else "plain"
    label = f"{name}: {row['top1']:.2f} %, {row['share']:.0%} of the compute"
    style = {"color": ORANGE, "marker": "*", "markersize": 14} if ensemble else {"color": BLUE, "marker": "o"}
    _plot_point(axes, row, images, label, **style)
    if not ensemble:
        axes.annotate(
            f"{row['exit']}",
            (row["macs"] / 1e6, row["top1"]),
            (-6, 6),
            textcoords="offset points",
            fontsize=10,
            ha="right",
        )


def _plot_point(axes: "Axes", row: ExitRow, images: int | None, label: str, **style: Any) -> None:
    top1 = row["top1"]
    interval = None
    if images:
        low, high = accuracy_interval(top1, images)
        interval = [[top1 - low], [high - top1]]
    axes.errorbar(
        [row["macs"] / 1e6], [top1], interval, label=label, linestyle="", capsize=3, **{"markersize": 8, **style}
    )


def _plot_early_exit(axes: "Axes", curve: Sequence[CurvePoint], calibrated: ExitRow | None, images: int | None) -> None:
    if curve:
        axes.plot(
            [point["macs"] / 1e6 for point in curve],
            [point["top1"] for point in curve],
            color=GREEN,
            marker=".",
            label="early exit, one threshold for all exits",
            zorder=3,
        )
    if calibrated:
        label = f"early exit, calibrated: {calibrated['top1']:.2f} %, {calibrated['share']:.0%} of the compute"
        _plot_point(axes, calibrated, images, label, color=GREEN, marker="D")
