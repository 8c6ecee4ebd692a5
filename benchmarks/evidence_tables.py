"""Tables and pictures from the lines of `evidence.py`.

    python benchmarks/evidence_tables.py        # prints them, and puts them into docs/evidence.md and docs/images/

A table shows each method at the point of the grid that its tuning chose, as soon as that is complete. Accuracies are
top-1 %: the mean over the seeds and half of its 95 % interval by Student's t. Differences are those of the deepest
exit, paired by seed, with the p-value of the paired t-test, one by one, without a correction for their number. A
setting whose lines come from different versions, hardware or images is marked; with one seed there is no interval,
which the table says.
"""

import argparse
import re
import warnings
from pathlib import Path
from statistics import median

from evidence_grid import METHODS, SETTINGS, TEACHERS
from evidence_picture import draw_gains
from evidence_points import Row, differences, find, tune
from intervals import format_mean, p_value
from json_lines import read_lines

from timm_selfdistill.cli import run

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
RIVALS = ["kd", "fitnet", "at", "dml", "dks"]
"""What the paper compares itself with, and DKS."""
DISTILLED = ["paper", "deepest", "ensemble", "dks"]
"""Those whose exits learn from one another."""
Runs = dict[int, Row]
"""Lines of a method, by seed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", type=Path, help="default: those of this repository")
    parser.add_argument("--page", type=Path, default=DOCS / "evidence.md")
    parser.add_argument("--picture", type=Path, default=DOCS / "images/evidence_gain.png")
    args = parser.parse_args()
    if args.lines:
        tables, settings = make_tables(args.lines)
    else:
        tables, settings = make_tables([RESULTS / "evidence_0.1.jsonl"])
        current, measured = make_tables([RESULTS / "evidence.jsonl"])
        tables |= {f"0.2 {name}": table for name, table in current.items()}
        settings |= {name: methods for name, methods in measured.items() if {"dsn", "ensemble"} <= methods.keys()}
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    args.page.write_text(insert(args.page.read_text(), tables))
    draw_gains(settings, args.picture)
    print(f"wrote {args.page}, {args.picture}")
    return 0


def make_tables(paths: list[Path]) -> tuple[dict[str, str], dict[str, dict[str, Runs]]]:
    """The tables by their names, and the runs of the phase "test" by setting and method."""
    rows = [row for path in paths for row in read_lines(path)]
    tables, settings = {}, {}
    for setting in SETTINGS:
        if tested := collect(rows, setting, "test"):
            tables[setting] = format_table(rows, setting, tested)
            settings[setting] = {method: _without_diverged(runs) for method, runs in tested.items()}
            if rivals := settings[setting].keys() & RIVALS:
                tables[f"rivals {setting}"] = format_rivals(settings[setting], sorted(rivals, key=RIVALS.index))
        if chosen := collect(rows, setting, "choose"):
            tables[f"choices {setting}"] = format_choices(rows, setting, chosen)
    if not tables:
        raise FileNotFoundError(
            f"no runs of the phase 'test' in {', '.join(map(str, paths))}; make them with python benchmarks/evidence.py"
        )
    return tables | {"depths": format_depths(settings)}, settings


def collect(rows: list[Row], setting: str, phase: str) -> dict[str, Runs]:
    """The lines of each method at its chosen point; without those whose tuning is not complete."""

    def lookup(runs: list[Row]) -> list[Row]:
        found = [find(rows, described) for described in runs]
        if None in found:
            raise LookupError
        return found

    collected = {}
    for method in METHODS:
        if any((row["phase"], row["setting"], row["method"]) == (phase, setting, method) for row in rows):
            try:
                (point,) = tune(setting, [method], lookup)
            except LookupError:
                warnings.warn(f"{setting}: {method} is left out, its tuning is not complete", stacklevel=2)
                continue
            described = {**point, "phase": phase}
            del described["seed"]
            runs = {row["seed"]: row for row in rows if described.items() <= row.items()}
            collected |= {method: dict(sorted(runs.items()))} if runs else {}
    return collected


def format_table(rows: list[Row], setting: str, tested: dict[str, Runs]) -> str:
    """Markdown, a row a method."""
    lines = [
        "| method | lr, weight decay, own weight | exits, shallow to deep | ensemble | deepest - plain |"
        " deepest - dsn | seconds | with teacher | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in tested.items():
        first, whole = next(iter(runs.values())), _without_diverged(runs)
        chosen = [first["lr"], first["weight_decay"], *([first["weight"]] if first["weight"] is not None else [])]
        cells = [
            _name(method, runs),
            ", ".join(f"{value:g}" for value in chosen),
            *_accuracies(whole),
            *(
                "" if method == base else format_difference(whole, _without_diverged(tested.get(base, {})))
                for base in ("plain", "dsn")
            ),
            _median([row["seconds"] for row in whole.values()]),
            _median([row["seconds"] and row["seconds"] + (row.get("teacher_seconds") or 0) for row in whole.values()]),
            _median([row["memory_mb"] for row in whole.values()]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", notes(rows, setting, tested)])


def format_rivals(tested: dict[str, Runs], rivals: list[str]) -> str:
    """Markdown, a row a rival: how far self distillation is above it at the deepest exit."""
    lines = ["| other | paper - other | ensemble - other |", "|---|---|---|"]
    for rival in rivals:
        cells = [format_difference(tested.get(ours, {}), tested[rival]) for ours in ("paper", "ensemble")]
        lines.append(f"| {' | '.join([rival, *cells])} |")
    return "\n".join(lines)


def format_depths(settings: dict[str, dict[str, Runs]]) -> str:
    """Markdown, a row a setting and method: how far each exit, and the mean of all, is above deep supervision's."""
    lines = ["| setting | method | exits - dsn's, shallow to deep | ensemble - dsn's |", "|---|---|---|---|"]
    for setting, tested in settings.items():
        for method in (method for method in DISTILLED if tested.get(method) and tested.get("dsn")):
            pairs = [(row, tested["dsn"][seed]) for seed, row in tested[method].items() if seed in tested["dsn"]]
            exits = zip(*([a - b for a, b in zip(row["top1"], other["top1"])] for row, other in pairs))
            means = [row["ensemble"] - other["ensemble"] for row, other in pairs]
            lines.append(
                f"| {setting} | {method} | {', '.join(format_mean(values, '+') for values in exits)} |"
                f" {format_mean(means, '+')} |"
            )
    return "\n".join(lines)


def format_choices(rows: list[Row], setting: str, chosen: dict[str, Runs]) -> str:
    """Markdown, a row a change: validation accuracy, and the difference to the method in which it is changed."""
    lines = ["| method | exits, shallow to deep | ensemble | deepest - unchanged |", "|---|---|---|---|"]
    for method, runs in chosen.items():
        base = METHODS[method].like
        difference = format_difference(_without_diverged(runs), _without_diverged(chosen.get(base, {}))) if base else ""
        lines.append(f"| {' | '.join([_name(method, runs), *_accuracies(_without_diverged(runs)), difference])} |")
    return "\n".join([*lines, "", notes(rows, setting, chosen)])


def _name(method: str, runs: Runs) -> str:
    diverged = len(runs) - len(_without_diverged(runs))
    return method + (f" ({diverged} of {len(runs)} seeds diverged)" if diverged else "")


def _without_diverged(runs: Runs) -> Runs:
    return {seed: row for seed, row in runs.items() if "diverged" not in row}


def _accuracies(runs: Runs) -> list[str]:
    """Of all exits, and of the ensemble."""
    ensemble = [row["ensemble"] for row in runs.values() if row["ensemble"] is not None]
    exits = zip(*(row["top1"] for row in runs.values()), strict=True)
    return [", ".join(map(format_mean, exits)), format_mean(ensemble) if ensemble else ""]


def _median(values: list[float | None]) -> str:
    return "" if not values or None in values else f"{median(values):.0f}"


def format_difference(runs: Runs, others: Runs) -> str:
    """Of the deepest exit's top-1, run by run of the same seed."""
    values = differences(runs, others)
    if len(values) < 2:
        return f"{values[0]:+.2f} (1 seed)" if values else ""
    return f"{format_mean(values, '+')} (p {p_value(values):.2g})"


def notes(rows: list[Row], setting: str, collected: dict[str, Runs]) -> str:
    """How many seeds, and on what; a warning where that differs within the table, tuning included."""
    used = [row for row in rows if row["setting"] == setting and row["method"] in {"teacher", *collected}]
    shown = [row for runs in collected.values() for row in runs.values()]
    counts = {method: len(runs) for method, runs in collected.items()}
    most = max(counts.values())
    seeds = f"{most} seed{'' if most == 1 else 's'}" + "".join(
        f", {count} of {method}" for method, count in counts.items() if count < most
    )
    described = SETTINGS[setting]
    images = "validation" if shown[0]["phase"] == "choose" else "test"
    found = [
        f"{median(row['images'] for row in shown if 'images' in row):,.0f} training images of {described.data},"
        f" {described.passes} passes, {described.network}; {seeds}; {images} images."
    ]
    if 1 in counts.values():
        found.append("No interval where there is one seed: nothing tells how much another would change.")
    if teachers := {row["seed"]: row["teacher_top1"] for row in shown if "teacher_top1" in row}:
        plain = [
            top1 - collected["plain"][seed]["top1"][-1]
            for seed, top1 in teachers.items()
            if "top1" in collected.get("plain", {}).get(seed, {})
        ]
        found.append(
            f"Teacher: {TEACHERS[described.network]}, {format_mean(list(teachers.values()))}"
            + (f" ({format_mean(plain, '+')} over plain)." if plain else ".")
        )
    hardware = sorted(
        {
            ", ".join([*(f"{key} {value}" for key, value in row["hardware"].items()), row["amp_dtype"] or "float32"])
            for row in used
        }
    )
    if len({row["data_sha256"] for row in used}) > 1:
        found.append("**Mixed: these lines come from different images.**")
    if len(hardware) > 1:
        found.append(
            f"**Mixed: these lines come from {len(hardware)} kinds of hardware or versions**: "
            + "; ".join(hardware)
            + "."
        )
    else:
        found.append(f"{hardware[0]}.")
    return " ".join(found)


def insert(page: str, tables: dict[str, str]) -> str:
    """A page with each table between its marks, <!-- table NAME --> and <!-- end -->."""
    left_out = []
    for name, table in tables.items():
        page, count = re.subn(
            rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", page, flags=re.DOTALL
        )
        if not count:
            left_out.append(name)
    if left_out:
        warnings.warn(f"the page has no marks for the tables {', '.join(left_out)}; they are left out", stacklevel=2)
    return page


if __name__ == "__main__":
    run(main)
