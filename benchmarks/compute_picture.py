"""Accuracy over compute: the exits of one self-distilled network beside plain networks of other sizes.

Each plain network is trained alone, as long as the self-distilled one, and tuned on the same grid; the plain networks
are narrower (the same stages with fewer channels) or shallower (the first stages with a classifier). Points are top-1 %
on the test images, means over the seeds with 95 % intervals by Student's t.

    python benchmarks/evidence.py --settings families-30 --methods plain ensemble
    python benchmarks/evidence.py --preset compute
    python benchmarks/compute_picture.py        # puts the table into docs/evidence.md, draws docs/images/compute.png
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from evidence_grid import NARROWER, SHALLOWER, create_network
from evidence_points import Row
from evidence_tables import DOCS, RESULTS, collect, insert
from intervals import mean_interval
from json_lines import read_lines
from matplotlib.axes import Axes

from timm_selfdistill import wrap_self_distill
from timm_selfdistill.cli import run
from timm_selfdistill.cost import count_cost
from timm_selfdistill.pictures import BLUE, ORANGE, create_figure, finish

SIZE = (1, 32, 32)


class Point(NamedTuple):
    name: str
    macs: int
    """Multiply-adds of an image."""
    top1: float
    half: float
    """Of the 95 % interval."""
    seeds: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", type=Path, default=[RESULTS / "evidence.jsonl"])
    parser.add_argument("--page", type=Path, default=DOCS / "evidence.md")
    parser.add_argument("--picture", type=Path, default=DOCS / "images/compute.png")
    args = parser.parse_args()
    rows = [row for path in args.lines for row in read_lines(path)]
    series = {
        "exits of one self-distilled network": exits(rows),
        "plain networks, narrower": plain_networks(rows, ["resnet10-8", *NARROWER, "resnet10-16"]),
        "plain networks, shallower": plain_networks(rows, [*SHALLOWER, "resnet10-16"]),
    }
    table = format_table(series)
    print(table)
    args.page.write_text(insert(args.page.read_text(), {"compute": table}))
    draw(series, args.picture)
    print(f"wrote {args.page}, {args.picture}")
    return 0


def exits(rows: list[Row]) -> list[Point]:
    """Of "families-30" with the ensemble as teacher, from the first exit to the deepest, then the ensemble."""
    runs = collect(rows, "families-30", "test")["ensemble"].values()
    costs = wrap_self_distill(create_network("resnet10-16", "families")).summary(SIZE)
    top1 = [*zip(*(row["top1"] for row in runs)), [row["ensemble"] for row in runs]]
    names = [*(f"exit {cost.exit}" for cost in costs[:-1]), "ensemble"]
    return [
        Point(name, cost.macs, *mean_interval(values), len(values))
        for name, cost, values in zip(names, costs, top1, strict=True)
    ]


def plain_networks(rows: list[Row], networks: list[str]) -> list[Point]:
    """Those with lines, by cost."""
    found = []
    for network in networks:
        setting = "families-30" if network == "resnet10-16" else f"families-30-{network}"
        if runs := collect(rows, setting, "test").get("plain"):
            cost = count_cost(create_network(network, "families"), SIZE)
            top1 = [row["top1"][-1] for row in runs.values()]
            found.append(Point(network, cost.macs, *mean_interval(top1), len(top1)))
    return sorted(found, key=lambda point: point.macs)


def format_table(series: dict[str, list[Point]]) -> str:
    lines = ["| | | MACs | top-1 % | seeds |", "|---|---|---|---|---|"]
    for name, points in series.items():
        for point in points:
            macs, top1 = f"{point.macs / 1e6:.2f} M", f"{point.top1:.1f} ± {point.half:.1f}"
            lines.append(f"| {name} | {point.name} | {macs} | {top1} | {point.seeds} |")
    return "\n".join(lines)


STYLES = {
    "exits of one self-distilled network": {"color": BLUE, "marker": "o"},
    "plain networks, narrower": {"color": "black", "marker": "s", "linestyle": "--"},
    "plain networks, shallower": {"color": "dimgray", "marker": "^", "linestyle": ":"},
}


def draw(series: dict[str, list[Point]], picture: Path) -> None:
    figure = create_figure(7, 4.5)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for name, points in series.items():
        _plot(axes, [point for point in points if point.name != "ensemble"], label=name, **STYLES[name])
        for ensemble in (point for point in points if point.name == "ensemble"):
            _plot(axes, [ensemble], label="ensemble of these exits", color=ORANGE, marker="*", markersize=14)
    for point in series["exits of one self-distilled network"]:
        if point.name != "ensemble":
            axes.annotate(
                point.name,
                (point.macs / 1e6, point.top1),
                (-8, 4),
                textcoords="offset points",
                fontsize=10,
                ha="right",
            )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    axes.legend(fontsize=10, loc="upper left")
    finish(axes, xlabel="multiply-adds per image, millions", ylabel="test top-1 %")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def _plot(axes: Axes, points: list[Point], **style: object) -> None:
    axes.errorbar(
        [point.macs / 1e6 for point in points],
        [point.top1 for point in points],
        [point.half for point in points],
        capsize=3,
        **{"markersize": 7, "linewidth": 2, **style},
    )


if __name__ == "__main__":
    run(main)
