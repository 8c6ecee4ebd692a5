"""What does self distillation bring, and when? Methods, networks, data sets and seeds, trained by the same `Trainer`.

A setting is a data set, how many images of each class, a network and a number of passes over the images; SETTINGS
has them, PRESETS groups them. For each setting and method

1. the phase "tune" trains every point of the grid with seed 0: all methods the same learning rates and weight decays
   (LRS x WEIGHT_DECAYS), then those that have a weight of their own two other values of it at the best of these;
2. the phase "test" trains the point whose last epoch was best on the validation images, by the deepest exit's top-1,
   with the seeds 1 to --seeds, and measures on the test images.

The preset "choices" changes one thing at a time at the chosen point of a method: its phase "choose" measures on the
validation images, so that nothing is chosen on the test images.

A seed draws the training images, their order and the first weights, and is the same for all methods, so that their
differences are paired. Optimizer: SGD with momentum, batches of 64, a cosine schedule after a linear warm-up. An epoch
of `Trainer`, as long as the warm-up, is five passes, since it evaluates and saves after each. Teachers of kd, fitnet
and at are larger networks (TEACHERS), tuned on the same grid and trained on the same images as the student.

`seconds` are those of the whole run of `Trainer`, the processor's on a CPU, the clock's on a GPU (none where --jobs
share it); the teacher's are `teacher_seconds`. `memory_mb` is the most that a forward and backward pass needs in
float32: weights, gradients and feature maps, without the optimizer's state.

    apt-get install $(cat benchmarks/typefaces.txt) dataset-fashion-mnist
    pip install -e ".[bench]"
    python benchmarks/typefaces.py
    python benchmarks/evidence.py --preset headline --output evidence.jsonl
    python benchmarks/evidence_tables.py evidence.jsonl       # tables and pictures from the lines

Finished runs are lines of --output: a benchmark that was stopped goes on where it was, also one that was killed while
it wrote; without --output it goes on with the lines of this repository. --minutes ends it in time for a machine that is
lent, judged by the longest run so far.
"""

import argparse
import sys
import time
from itertools import takewhile
from pathlib import Path

from evidence_grid import METHODS, PRESETS, SETTINGS
from evidence_points import Row, find, tune
from evidence_runs import measure, teacher_path
from joblib import Parallel, delayed
from json_lines import append_line, read_lines

from timm_selfdistill.cli import run

SHOWN = ("phase", "setting", "method", "seed", "weight", "lr", "weight_decay")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="headline", choices=PRESETS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="instead of the preset's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="instead of the preset's")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="of a run")
    parser.add_argument("--amp-dtype", choices=["float16", "bfloat16"], help="mixed precision")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that would not end in time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/evidence.jsonl"))
    args = parser.parse_args()
    settings, methods = PRESETS[args.preset]
    bench = Bench(args)
    for setting in args.settings or settings:
        bench.compare(setting, args.methods or methods)
    print(f"all runs are in {args.output}")
    return 0


class Bench:
    """The runs of a file, each done once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.ends = args, time.monotonic() + 60 * args.minutes
        self.rows = [row for row in read_lines(args.output) if row["amp_dtype"] == args.amp_dtype]
        self.longest = max((row.get("wall_seconds", 0) for row in self.rows), default=0)

    def compare(self, setting: str, methods: list[str]) -> None:
        """Tunes the methods, and the teacher of those that need one, and tests them.

        What is changed in a method (`Method.like`) is no test but a choice: it is measured on the validation images.
        """
        seeds = range(1, self.args.seeds + 1)
        if any(METHODS[method].other == "teacher" for method in methods):
            (teacher,) = tune(setting, ["teacher"], self.complete)
            self.complete([{**teacher, "phase": "teacher", "seed": seed} for seed in (0, *seeds)])
        phase = "choose" if any(METHODS[method].like for method in methods) else "test"
        points = tune(setting, methods, self.complete)
        self.complete([{**point, "phase": phase, "seed": seed} for point in points for seed in seeds])

    def complete(self, runs: list[Row]) -> list[Row]:
        """Runs with what was measured: their lines, or new ones."""
        missing = [described for described in runs if self._find(described) is None]
        in_time = takewhile(lambda _: time.monotonic() + self.longest < self.ends, missing)
        parallel = Parallel(self.args.jobs, return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1)
        for row in parallel(delayed(measure)(described, self.args) for described in in_time):
            self.longest = max(self.longest, row["wall_seconds"])
            self.rows.append(row)
            append_line(self.args.output, row)
            print(
                *(row[name] for name in SHOWN),
                *(f"{top1:.2f}" for top1 in row["top1"]),
                row.get("diverged", ""),
                flush=True,
            )
        rows = [self._find(described) for described in runs]
        if None in rows:
            print("the time is up; the same command goes on")
            sys.exit(0)
        return rows

    def _find(self, described: Row) -> Row | None:
        """Its line; that of a teacher is worth nothing without its weights."""
        gone = described["phase"] == "teacher" and not teacher_path(described, self.args).exists()
        return None if gone else find(self.rows, described)


if __name__ == "__main__":
    run(main)
