"""Tables and pictures from the lines of `evidence.py`.

    python benchmarks/evidence_tables.py        # prints them, and puts them into docs/evidence.md and docs/images/

A table's accuracies are top-1 % on the test images: the mean over the seeds and half of its 95 % interval by Student's
t. Differences are those of the deepest exit, paired by seed, with the p-value of the paired t-test. A setting whose
lines come from different versions or hardware is marked; with one seed there is no interval, which the table says.
"""
import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evidence_data import DATA
from evidence_grid import METHODS, SETTINGS
from intervals import mean_interval, p_value
from json_lines import read_lines
from matplotlib.figure import Figure

from timm_selfdistill.cli import run

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
COLORS = {"dsn": "tab:gray", "paper": "tab:orange", "deepest": "tab:red", "ensemble": "tab:blue", "dks": "tab:green"}
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", type=Path, default=sorted(RESULTS.glob("evidence*.jsonl")))
    parser.add_argument("--page", type=Path, default=DOCS / "evidence.md")
    parser.add_argument("--picture", type=Path, default=DOCS / "images/evidence_gain.png")
    args = parser.parse_args()
    rows = [row for path in args.lines for row in read_lines(path) if row["phase"] == "test"]
    if not rows:
        raise FileNotFoundError(f"no runs of the phase 'test' in {', '.join(map(str, args.lines)) or RESULTS}; make"
                                " them with python benchmarks/evidence.py")
    tables = {setting: format_table(rows, setting) for setting in SETTINGS
              if any(row["setting"] == setting for row in rows)}
    for setting, table in tables.items():
        print(f"{setting}\n\n{table}\n")
    args.page.write_text(insert(args.page.read_text(), tables))
    draw_gains(rows, args.picture)
    return 0


def format_table(rows: list[Row], setting: str) -> str:
    """Markdown, a row a method."""
    by_method = {method: {row["seed"]: row for row in rows if (row["setting"], row["method"]) == (setting, method)}
                 for method in METHODS}
    by_method = {method: runs for method, runs in by_method.items() if runs}
    lines = ["| method | lr, weight decay, own weight | exits, shallow to deep | ensemble | deepest - plain |"
             " deepest - dsn | seconds | with teacher | MB |", "|---|---|---|---|---|---|---|---|---|"]
    for method, runs in by_method.items():
        first, exits = next(iter(runs.values())), zip(*(row["top1"] for row in runs.values()))
        chosen = [first["lr"], first["weight_decay"], *([first["weight"]] if first["weight"] is not None else [])]
        ensemble = [row["ensemble"] for row in runs.values() if row["ensemble"] is not None]
        cells = [method, ", ".join(f"{value:g}" for value in chosen), ", ".join(map(format_mean, exits)),
                 format_mean(ensemble) if ensemble else "",
                 *("" if method == base else format_difference(runs, by_method.get(base, {}))
                   for base in ("plain", "dsn")),
                 f"{median(row['seconds'] for row in runs.values()):.0f}",
                 f"{median(row['seconds'] + row.get('teacher_seconds', 0) for row in runs.values()):.0f}",
                 f"{median(row['memory_mb'] for row in runs.values()):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes([row for runs in by_method.values() for row in runs.values()])])


def format_mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return "{:.2f} ± {:.2f}".format(*mean_interval(list(values)))


def format_difference(runs: dict[int, Row], others: dict[int, Row]) -> str:
    """Of the deepest exit's top-1, run by run of the same seed."""
    values = differences(runs, others)
    if len(values) < 2:
        return f"{values[0]:+.2f}" if values else ""
    return "{:+.2f} ± {:.2f} (p {:.2g})".format(*mean_interval(values), p_value(values))


def differences(runs: dict[int, Row], others: dict[int, Row]) -> list[float]:
    return [row["top1"][-1] - others[seed]["top1"][-1] for seed, row in sorted(runs.items()) if seed in others]


def notes(rows: list[Row]) -> list[str]:
    """How many seeds, and on what; a warning where that differs within the table."""
    counts = {method: len({row["seed"] for row in rows if row["method"] == method})
              for method in dict.fromkeys(row["method"] for row in rows)}
    seeds = ", ".join(sorted({str(count) for count in counts.values()}))
    setting = SETTINGS[rows[0]["setting"]]
    images = median(row["images"] for row in rows)
    found = [f"{images:,.0f} training images of {setting.data}, {setting.passes} passes, {setting.network}; {seeds}"
             f" seed{'' if seeds == '1' else 's'}."]
    if 1 in counts.values():
        found.append("No interval where there is one seed: nothing tells how much another would change.")
    hardware = sorted({", ".join(f"{key} {value}" for key, value in row["hardware"].items()) for row in rows})
    if len({row["data_sha256"] for row in rows}) > 1:
        found.append("**Mixed: these lines come from different images.**")
    if len(hardware) > 1:
        found.append(f"**Mixed: these lines come from {len(hardware)} kinds of hardware or versions**: "
                     + "; ".join(hardware) + ".")
    else:
        found.append(f"{hardware[0]}.")
    return [" ".join(found)]


def insert(page: str, tables: dict[str, str]) -> str:
    """A page with each table between its marks, <!-- table NAME --> and <!-- end -->."""
    for setting, table in tables.items():
        page = re.sub(rf"(<!-- table {re.escape(setting)} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", page,
                      flags=re.DOTALL)
    return page


def draw_gains(rows: list[Row], picture: Path) -> None:
    """The gain over the plain network against images per class, a panel a data set."""
    points = [(SETTINGS[row["setting"]], row) for row in rows]
    panels = list(dict.fromkeys(setting.data for setting, _ in points))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels):
        for index, (method, color) in enumerate(COLORS.items()):
            found = gains(rows, data, method)
            if found:
                counts, means, halves = zip(*found)
                beside = [count * 1.03**index for count in counts]  # so that no interval hides another
                axes.errorbar(beside, means, halves, color=color, label=method, capsize=3, marker="o", markersize=4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=data, xlabel="training images of a class", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("deepest exit less plain network, points")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    print(f"wrote {picture}")


def gains(rows: list[Row], data: str, method: str) -> list[tuple[float, float, float]]:
    """Images per class, mean gain over plain and half its interval, for the settings of one network and 2 or more
    seeds."""
    found = []
    for name, setting in SETTINGS.items():
        runs, others = ({row["seed"]: row for row in rows if (row["setting"], row["method"]) == (name, kind)}
                        for kind in (method, "plain"))
        values = differences(runs, others)
        if setting.data == data and re.fullmatch(rf"{data}(-\d+)?", name) and len(values) > 1:
            images = next(iter(runs.values()))["images"]
            found.append((images / DATA[data], *mean_interval(values)))
    return sorted(found)


if __name__ == "__main__":
    run(main)
