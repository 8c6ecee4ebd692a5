"""Do the paper's explanations hold? Flat minima, gradients and separability of networks trained as in `evidence.py`.

Trains the points that `evidence.py` has tested (its lines of the phase "test") once more, with the same seeds, and
measures each network on 2,000 test images, for the gradients on up to 640 of its training images, in random order:

- how far the deepest exit's top-1 falls with noise on the weights (levels over each tensor's root mean square; five
  draws, the same for all networks of a seed);
- the mean absolute gradient of each section after every fifth pass, over that of the plain network of the same seed;
- SSE / SSB in front of every exit.

    python benchmarks/explanations.py                     # lines go to benchmarks/results/explanations.jsonl
    python benchmarks/explanations.py --tables            # tables from the lines, into docs/evidence.md

Resumable like `evidence.py`.
"""

import argparse
import io
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from statistics import geometric_mean

import torch
from evidence_data import Images, load_measured, load_training
from evidence_grid import METHODS
from evidence_points import Row
from evidence_runs import BATCH_SIZE, create_task, create_trainer
from evidence_tables import DOCS, collect, insert
from hardware import describe
from intervals import format_mean
from json_lines import append_line, read_lines
from torch.utils.data import DataLoader, Subset

from timm_selfdistill import SelfDistillModel
from timm_selfdistill.analysis import measure_flatness, measure_gradients, measure_separability
from timm_selfdistill.cli import run as run_program
from timm_selfdistill.cli.opening import load_checkpoints

RESULTS = Path("benchmarks/results")
LEVELS = (0.1, 0.2, 0.3)
DESCRIBED = ("setting", "data", "per_class", "network", "passes", "method", "weight", "lr", "weight_decay", "seed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, default=RESULTS / "evidence.jsonl", help="of evidence.py")
    parser.add_argument("--setting", default="characters-10")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["paper", "ensemble"],
        help="beside plain",
        choices=[name for name, method in METHODS.items() if method.other != "teacher"],
    )
    parser.add_argument("--tables", action="store_true", help="only draw the tables")
    parser.add_argument("--page", type=Path, default=DOCS / "evidence.md")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "explanations.jsonl")
    args = parser.parse_args()
    args.amp_dtype, args.jobs, args.methods = None, 1, list(dict.fromkeys(["plain", *args.methods]))
    torch.set_num_threads(args.threads)
    wanted = describe_runs(args)
    if not args.tables:
        complete(wanted, args)
    rows = [row for row in read_lines(args.output) if any(described.items() <= row.items() for described in wanted)]
    if not rows:
        raise FileNotFoundError(
            f"no runs of {args.setting} in {args.output}; make them with python benchmarks/explanations.py"
        )
    table = format_table(rows)
    print(table)
    args.page.write_text(insert(args.page.read_text(), {"explanations": table}))
    return 0


def describe_runs(args: argparse.Namespace) -> list[Row]:
    """Those that `evidence.py` has tested, at the points that tuning chose."""
    tested = collect(read_lines(args.lines), args.setting, "test")
    for method in args.methods:
        if method not in tested:
            raise ValueError(
                f"{args.lines} has no tested runs of {method} in {args.setting}; make them with python"
                f" benchmarks/evidence.py --settings {args.setting} --methods {method}"
            )
    return [{name: row[name] for name in DESCRIBED} for method in args.methods for row in tested[method].values()]


def complete(wanted: list[Row], args: argparse.Namespace) -> None:
    """Train and measure the runs whose lines are missing."""
    done = read_lines(args.output)
    for described in wanted:
        if not any(described.items() <= row.items() for row in done):
            append_line(args.output, described | measure(described, args) | {"hardware": describe(args.device)})
            print(*described.values(), flush=True)


def measure(described: Row, args: argparse.Namespace) -> Row:
    train = load_training(described["data"], described["per_class"], described["seed"])
    test = load_measured(described["data"], "test")
    images, learned = DataLoader(some(test, 2000), 500), DataLoader(some(train, 640), BATCH_SIZE)
    run = described | {"phase": "test"}
    task, _ = create_task(run, len(train), args)
    with tempfile.TemporaryDirectory() as output, redirect_stdout(io.StringIO()):
        trainer = create_trainer(task, train, test, run, args, output=output, checkpoint_hist=1000)
        if trainer.fit().interrupted_by:
            sys.exit("stopped; the same command goes on")
        model = trainer.eval_model
        falls = [row["top1"] for row in measure_flatness(model, images, levels=LEVELS, seed=run["seed"]).of_exit()]
        separability = measure_separability(model, images).rows if isinstance(model, SelfDistillModel) else []
        gradients = [measure_gradients(task, learned).gradients for _ in load_checkpoints(model, Path(output))]
    return {"top1": falls, "gradients": gradients, "sse_over_ssb": [row.ratio for row in separability]}


def some(images: Images, count: int) -> Subset:
    """Random ones, in random order, the same at every call; all where there are fewer."""
    return Subset(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist())


def format_table(rows: list[Row]) -> str:
    """Markdown, a row a method: means over the seeds and half of their 95 % interval."""
    methods: dict[str, dict[int, Row]] = {}
    for row in rows:
        methods.setdefault(row["method"], {})[row["seed"]] = row
    heads = [
        "method",
        *(f"fall at noise {level:g}" for level in LEVELS),
        "less than plain's, at the last",
        "gradient over plain's, by section",
        "SSE / SSB, by exit",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for method, runs in methods.items():
        pairs = [(row, methods["plain"][seed]) for seed, row in sorted(runs.items()) if seed in methods["plain"]]
        less = [_falls(other)[-1] - _falls(row)[-1] for row, other in pairs]
        cells = [method, *map(format_mean, zip(*map(_falls, runs.values())))]
        if method == "plain":
            cells += ["", "", ""]
        else:
            ratios = zip(*(_gradient_ratios(*pair) for pair in pairs))
            separability = zip(*(row["sse_over_ssb"] for row in runs.values()))
            cells += [
                format_mean(less, "+"),
                ", ".join(map(format_mean, ratios)),
                ", ".join(map(format_mean, separability)),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = sorted({len(runs) for runs in methods.values()})
    hardware = {", ".join(f"{key} {value}" for key, value in row["hardware"].items()) for row in rows}
    note = f"{rows[0]['setting']}; {', '.join(map(str, seeds))} seeds. {'; '.join(sorted(hardware))}."
    return "\n".join([*lines, "", note])


def _falls(row: Row) -> list[float]:
    """Points of top-1 that each level of noise takes."""
    return [row["top1"][0] - top1 for top1 in row["top1"][1:]]


def _gradient_ratios(row: Row, plain: Row) -> list[float]:
    """Of each section, the geometric mean over the checkpoints."""
    pairs = zip(zip(*row["gradients"]), zip(*plain["gradients"]))
    return [geometric_mean(ours) / geometric_mean(others) for ours, others in pairs]


if __name__ == "__main__":
    run_program(main)
