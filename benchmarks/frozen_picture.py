"""What `frozen_vs_earlyon.py` found: comparisons at three budgets, and the picture.

python benchmarks/frozen_picture.py
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from intervals import mean_interval
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from timm_selfdistill.pictures import BLUE, GREEN, ORANGE, PURPLE, create_figure, finish

BUDGETS = [0.75, 0.5, 0.35]
LINES = {"ours": BLUE, "ours, linear": GREEN, "earlyon": ORANGE, "earlyon, 20 epochs": PURPLE}
Row = dict[str, Any]


def compare(rows: list[Row]) -> list[Row]:
    """Means over the seeds at each budget that a method can keep, and ours less earlyon's, paired by seed, with its
    95 % t-interval."""
    comparisons = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        for budget in BUDGETS:
            by_seed = {
                method: {
                    row["seed"]: at_share(row["points"], budget)
                    for row in own
                    if row["method"] == method and min(point["share"] for point in row["points"]) <= budget
                }
                for method in LINES
            }
            differences = {
                method: [
                    ours - by_seed[method][seed] for seed, ours in by_seed["ours"].items() if seed in by_seed[method]
                ]
                for method in by_seed
                if method.startswith("earlyon")
            }
            comparisons.append(
                {
                    "network": network,
                    "budget": budget,
                    "top1": {method: mean(found.values()) for method, found in by_seed.items() if found},
                    "ours_less": {method: describe(values) for method, values in differences.items() if values},
                    "static": best_static(own, budget),
                }
            )
    return comparisons


def compare_static(rows: list[Row]) -> list[Row]:
    """Ours less each smaller network, at that one's share of the multiply-adds; likewise."""
    comparisons = []
    ours = {(row["network"], row["seed"]): row["points"] for row in rows if row["method"] == "ours"}
    for network, method in dict.fromkeys((row["network"], row["method"]) for row in rows):
        if method not in LINES:
            points = {
                row["seed"]: row["points"][0] for row in rows if (row["network"], row["method"]) == (network, method)
            }
            values = [at_share(ours[network, seed], point["share"]) - point["top1"] for seed, point in points.items()]
            share = mean(point["share"] for point in points.values())
            comparisons.append({"network": network, "static": method, "share": share, "ours_less": describe(values)})
    return comparisons


def describe(values: list[float]) -> Row:
    return {"mean": mean(values), "interval": interval(values), "by_seed": values}


def at_share(points: list[dict[str, float]], share: float) -> float:
    """Accuracy at a share of the multiply-adds, between two points on the line that joins them; NaN below them all."""
    ordered = sorted(points, key=lambda point: point["share"])
    shares, accuracies = ([point[key] for point in ordered] for key in ("share", "top1"))
    return float(np.interp(share, shares, accuracies, left=np.nan))


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % t-interval of the mean."""
    if len(values) < 2:
        return float("-inf"), float("inf")
    middle, half = mean_interval(values)
    return middle - half, middle + half


def static_networks(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Share of the multiply-adds and mean accuracy of each."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] not in LINES:
            points.setdefault(row["method"], []).append((row["points"][0]["share"], row["points"][0]["top1"]))
    return {name: tuple(map(mean, zip(*values))) for name, values in points.items()}


def best_static(rows: list[Row], budget: float) -> Row | None:
    """The most accurate network within the budget."""
    found = [
        {"network": name, "share": share, "top1": accuracy}
        for name, (share, accuracy) in static_networks(rows).items()
        if share <= budget
    ]
    return max(found, key=lambda network: network["top1"], default=None)


def print_table(comparisons: list[Row], static: list[Row]) -> None:
    for row in comparisons:
        print(
            f"{row['network']} at {row['budget']:.0%}: "
            + ", ".join(f"{method} {top1:.2f}" for method, top1 in row["top1"].items())
        )
        for method, difference in row["ours_less"].items():
            low, high = difference["interval"]
            print(f"    ours less {method}: {difference['mean']:+.2f} [{low:+.2f}, {high:+.2f}]")
        if row["static"]:
            print("    static: {network}, {top1:.2f} at {share:.0%}".format(**row["static"]))
    for row in static:
        low, high = row["ours_less"]["interval"]
        print(
            f"{row['network']}: ours less {row['static']} at its {row['share']:.2%}: {row['ours_less']['mean']:+.2f}"
            f" [{low:+.2f}, {high:+.2f}]"
        )


def draw(results: Path, picture: Path) -> None:
    """Accuracy over compute, a panel a network."""
    rows = [row for row in json.loads(results.read_text())["rows"] if "method" in row]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = create_figure(4.3 * len(networks), 4.8)
    figure.set_layout_engine("constrained")
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks):
        draw_panel(axes, [row for row in rows if row["network"] == network])
        finish(axes, title=network, xlabel="multiply-adds / network without exits", ylabel="test top-1 %")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.margins(0.14, 0.09)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    print(f"wrote {picture}")


def draw_panel(axes: Axes, rows: list[Row]) -> None:
    for method, color in LINES.items():
        curves = [row["points"] for row in rows if row["method"] == method]
        if curves:
            shares = np.linspace(max(min(point["share"] for point in points) for points in curves), 1, 100)
            accuracy = np.array([[at_share(points, share) for share in shares] for points in curves])
            axes.plot(shares, accuracy.mean(0), color=color, label=f"{method}, {len(curves)} seeds: mean and range")
            axes.fill_between(shares, accuracy.min(0), accuracy.max(0), color=color, alpha=0.15, linewidth=0)
    plain = mean(row["exit_top1"][-1] for row in rows if row["method"] == "ours")
    axes.scatter(1, plain, color="black", marker="*", s=90, zorder=3, label="the network without exits")
    for budget in BUDGETS:
        axes.axvline(budget, color="gray", linewidth=0.8, linestyle=":")
    for index, (name, (share, accuracy)) in enumerate(static_networks(rows).items()):
        axes.scatter(share, accuracy, color="black", marker="x", label=None if index else "smaller networks, no exits")
        below = (0, -8 - 12 * (index % 2))
        axes.annotate(name, (share, accuracy), below, textcoords="offset points", fontsize=9, ha="center", va="top")


if __name__ == "__main__":
    draw(Path("benchmarks/results/frozen_vs_earlyon.json"), Path("docs/images/frozen_vs_earlyon.png"))
