"""What does self distillation bring, and when? Methods, networks, data sets and seeds, trained by the same `Trainer`.

A setting is a data set, how many images of each class, a network and a number of passes over the images; SETTINGS
has them, PRESETS groups them. For each setting and method

1. the phase "tune" trains every point of the grid with seed 0: all methods the same learning rates and weight decays
   (LRS x WEIGHT_DECAYS), then those that have a weight of their own two other values of it at the best of these;
2. the phase "test" trains the point whose last epoch was best on the validation images, by the deepest exit's top-1,
   with the seeds 1 to --seeds, and measures on the test images.

A seed draws the training images, their order and the first weights, and is the same for all methods, so that their
differences are paired. Optimizer: SGD with momentum, cosine schedule, batches of 64. An epoch of `Trainer` is five
passes, since it evaluates and saves after each. Teachers of kd, fitnet and at are larger networks (TEACHERS), trained
plainly on the same images with the plain network's best settings; their time counts as `teacher_seconds`. `seconds` are
the processor's on a CPU; `memory_mb` is that of the tensors that live at one time in a training step.

    apt-get install $(cat benchmarks/typefaces.txt) dataset-fashion-mnist
    pip install -e ".[bench]"
    python benchmarks/typefaces.py
    python benchmarks/evidence.py --preset headline       # lines go to benchmarks/results/evidence.jsonl
    python benchmarks/evidence_tables.py                  # tables and pictures from the lines

Finished runs are lines of --output: a benchmark that was stopped goes on where it was, also one that was killed while
it wrote. --minutes ends it in time for a machine that is lent.
"""
import argparse
import copy
import io
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import islice, product, takewhile
from pathlib import Path
from typing import Any

import torch
from evidence_data import Images, digest, load_measured, load_training
from evidence_grid import LRS, METHODS, PRESETS, SETTINGS, TEACHERS, WEIGHT_DECAYS, create_network
from hardware import describe
from joblib import Parallel, delayed
from json_lines import append_line, read_lines
from memory import peak_memory
from timm.task import TrainingTask
from torch.utils.data import DataLoader, Subset

from timm_selfdistill import TrainConfig, Trainer
from timm_selfdistill.cli import run
from timm_selfdistill.training.metrics import measure_exits

BATCH_SIZE = 64
PASSES = 5
"""Over the images, in an epoch of `Trainer`."""
SHOWN = ("phase", "setting", "method", "seed", "weight", "lr", "weight_decay")
Row = dict[str, Any]


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
    return 0


class Bench:
    """The runs of a file, each done once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows, self.longest = args, read_lines(args.output), 0.0
        self.ends = time.monotonic() + 60 * args.minutes

    def compare(self, setting: str, methods: list[str]) -> None:
        """Tunes all methods, trains the teachers of those that need one, and tests."""
        if any(METHODS[method].other == "teacher" for method in methods):
            plain, = self.tune(setting, ["plain"])
            self.complete([{**plain, "phase": "teacher", "network": TEACHERS[SETTINGS[setting].network], "seed": seed}
                           for seed in range(self.args.seeds + 1)])
        best = self.tune(setting, methods)
        seeds = range(1, self.args.seeds + 1)
        self.complete([{**best_run, "phase": "test", "seed": seed} for best_run in best for seed in seeds])

    def tune(self, setting: str, methods: list[str]) -> list[Row]:
        """The points of the grid that are best on the validation images; the first of equals."""
        common = {"phase": "tune", "setting": setting, **SETTINGS[setting]._asdict(), "seed": 0}
        tuned = list(dict.fromkeys(METHODS[method].like or method for method in methods))
        shared = self._best([
            [{**common, "method": method, "weight": METHODS[method].weights[0], "lr": lr, "weight_decay": decay}
             for lr, decay in product(LRS, WEIGHT_DECAYS)] for method in tuned])
        best = self._best([[{**run, "weight": weight} for weight in METHODS[run["method"]].weights] for run in shared])
        points = dict(zip(tuned, best))
        return [{**points[METHODS[method].like or method], "method": method} for method in methods]

    def _best(self, groups: list[list[Row]]) -> list[Row]:
        """The run of each group whose deepest exit has the highest top-1."""
        rows = iter(self.complete([run for group in groups for run in group]))
        top1 = [[row["top1"][-1] for row in islice(rows, len(group))] for group in groups]
        return [group[values.index(max(values))] for group, values in zip(groups, top1)]

    def complete(self, runs: list[Row]) -> list[Row]:
        """Runs with what was measured: their lines, or new ones."""
        missing = [run for run in runs if self._find(run) is None]
        in_time = takewhile(lambda _: time.monotonic() + self.longest < self.ends, missing)
        parallel = Parallel(self.args.jobs, return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1)
        for row, seconds in parallel(delayed(measure)(described, self.args) for described in in_time):
            self.longest = max(self.longest, seconds)
            self.rows.append(row)
            append_line(self.args.output, row)
            print(*(row[name] for name in SHOWN), *(f"{top1:.2f}" for top1 in row["top1"]), row.get("diverged", ""),
                  flush=True)
        rows = [self._find(run) for run in runs]
        if None in rows:
            print("the time is up; the same command goes on")
            sys.exit(0)
        return rows

    def _find(self, run: Row) -> Row | None:
        return next((row for row in self.rows if run.items() <= row.items()), None)


def measure(run: Row, args: argparse.Namespace) -> tuple[Row, float]:
    """The line of a run, and the seconds that it took."""
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(run["seed"])
    method = METHODS["plain" if run["phase"] == "teacher" else run["method"]]
    model, facts = create_network(run["network"], run["data"]), {}
    train = load_training(run["data"], run["per_class"], run["seed"])
    arguments = [model, run["weight"], run["passes"] * len(train) // BATCH_SIZE]
    if method.other == "peer":
        arguments.append(create_network(run["network"], run["data"]))
    elif method.other == "teacher":
        saved = torch.load(teacher_path(run, args), weights_only=True)
        teacher = create_network(TEACHERS[run["network"]], run["data"])
        teacher.load_state_dict(saved["state"])
        arguments.append(teacher.to(memory_format=torch.channels_last))
        facts = {"teacher_seconds": saved["seconds"], "teacher_top1": saved["top1"]}
    facts |= train_and_measure(method.make(*arguments), train, run, args)
    if run["phase"] == "teacher":
        path = teacher_path(run, args)
        path.parent.mkdir(exist_ok=True)
        saved = {"state": model.cpu().state_dict(), "seconds": facts["seconds"], "top1": facts["top1"][-1]}
        torch.save(saved, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
    hardware = describe(args.device) | ({"jobs": args.jobs} if args.device == "cuda" else {})
    row = run | facts | {"amp_dtype": args.amp_dtype, "hardware": hardware, "data_sha256": digest(run["data"])}
    return row, time.monotonic() - began


def teacher_path(run: Row, args: argparse.Namespace) -> Path:
    return args.output.with_suffix("") / f"{run['setting']}-{run['seed']}.pt"


def train_and_measure(task: TrainingTask, train: Images, run: Row, args: argparse.Namespace) -> Row:
    """Top-1 of every exit and of the ensemble after the last epoch, in per cent; time and memory of the training."""
    measured = load_measured(run["data"], "validation" if run["phase"] == "tune" else "test")
    memory = step_memory(task, args.device)
    torch.manual_seed(run["seed"])
    with tempfile.TemporaryDirectory() as output, redirect_stdout(io.StringIO()):
        repeated = Subset(train, list(range(len(train))) * PASSES)
        trainer = Trainer(task, repeated, Subset(measured, range(BATCH_SIZE)), TrainConfig(
            output=output, seed=run["seed"], epochs=run["passes"] // PASSES, batch_size=BATCH_SIZE, workers=0,
            opt="sgd", lr=run["lr"], weight_decay=run["weight_decay"], channels_last=True,
            amp=args.amp_dtype is not None, amp_dtype=args.amp_dtype or "float16"))
        clock = time.perf_counter if args.device == "cuda" else time.process_time  # others may use the processor, too
        began = clock()
        try:
            if trainer.fit().interrupted_by:
                sys.exit("stopped; the same command goes on")
        except FloatingPointError as error:  # a point of the grid that nobody should choose
            return {"top1": [0.0], "ensemble": None, "diverged": str(error)}
        seconds = clock() - began
    metrics, _ = measure_exits(
        trainer.eval_model, (trainer.update.to_device(*batch) for batch in DataLoader(measured, 500)),
        trainer.accelerator)
    return {"top1": [metric.top1 for metric in metrics if metric.exit != "ensemble"],
            "ensemble": next((metric.top1 for metric in metrics if metric.exit == "ensemble"), None),
            "images": len(train), "seconds": round(seconds, 1),
            "memory_mb": round(memory / 1e6, 1)}


def step_memory(task: TrainingTask, device: str) -> int:
    """Bytes at the worst moment of a forward and backward pass."""
    task = copy.deepcopy(task).to(device).train()
    x, y = torch.zeros(BATCH_SIZE, 1, 32, 32, device=device), torch.zeros(BATCH_SIZE, dtype=torch.long, device=device)
    return peak_memory(task, lambda: task(x, y)["loss"].backward(), device)


if __name__ == "__main__":
    run(main)
