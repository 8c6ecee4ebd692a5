"""exits.png: accuracy over multiply-adds, an exit a point."""
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_exits(path: Path, model: str, rows: list[dict[str, Any]]) -> None:
    """Draw the rows, each with exit, module, top1 (per cent), macs and share."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    line = [row for row in rows if row["exit"] != "ensemble"]
    axes.plot([row["macs"] / 1e6 for row in line], [row["top1"] for row in line], color="tab:blue", alpha=0.4, zorder=1)
    for index, row in enumerate(rows):
        ensemble = row["exit"] == "ensemble"
        style = exit_style(index, len(rows), str(row["exit"]))
        label = "ensemble" if ensemble else f"exit {row['exit']} ({row['module']})" if row["module"] else "plain"
        axes.scatter(row["macs"] / 1e6, row["top1"], s=120 if ensemble else 60, color=style["color"],
                     alpha=style.get("alpha"), marker="*" if ensemble else "o", zorder=2,
                     label=f"{label}: {row['top1']:.2f} %, {row['share']:.0%} of the compute")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.18), fontsize=9, frameon=False)
    axes.set(xlabel="multiply-adds per image, millions", ylabel="top-1 %", xlim=(0, None),
             title=f"{model}: accuracy over compute")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def exit_style(index: int, count: int, name: str) -> dict[str, Any]:
    """The look of an exit among `count` rows, in every picture the same."""
    if name == "ensemble":
        return {"color": "tab:orange", "linestyle": "--"}
    return {"color": "tab:blue", "alpha": 0.35 + 0.65 * index / max(1, count - 2)}
