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
from itertools import product
from pathlib import Path
from typing import Any

import torch
from evidence_data import digest, load_measured, load_training
from evidence_grid import LRS, METHODS, PRESETS, SETTINGS, TEACHERS, WEIGHT_DECAYS, create_network
from hardware import describe
from json_lines import append_line, read_lines
from memory import peak_memory
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--amp-dtype", choices=["float16", "bfloat16"], help="mixed precision")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that would not end in time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/evidence.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    settings, methods = PRESETS[args.preset]
    for setting, method in product(args.settings or settings, args.methods or methods):
        best = bench.tune(setting, method)
        for seed in range(1, args.seeds + 1):
            bench.complete({**best, "phase": "test", "seed": seed})
    return 0


class Bench:
    """The runs of a file, each done once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows, self.longest = args, read_lines(args.output), 0.0
        self.ends = time.monotonic() + 60 * args.minutes
        self.facts = {"amp_dtype": args.amp_dtype, "hardware": describe(args.device)}

    def tune(self, setting: str, method: str) -> Row:
        """The point of the grid that is best on the validation images; the first of equals."""
        weights = METHODS[method].weights or (None,)
        point = {"phase": "tune", "setting": setting, **SETTINGS[setting]._asdict(), "method": method, "seed": 0,
                 "weight": weights[0]}
        shared = [{**point, "lr": lr, "weight_decay": decay} for lr, decay in product(LRS, WEIGHT_DECAYS)]
        best = max(shared, key=self._top1)
        return max([best, *({**best, "weight": weight} for weight in weights[1:])], key=self._top1)

    def _top1(self, run: Row) -> float:
        """Of the deepest exit, in per cent."""
        return self.complete(run)["top1"][-1]

    def complete(self, run: Row) -> Row:
        """A run with what was measured: its line, or a new one."""
        row = next((row for row in self.rows if run.items() <= row.items()), None)
        if row is not None:
            return row
        if time.monotonic() + self.longest > self.ends:
            print("the time is up; the same command goes on")
            sys.exit(0)
        began = time.monotonic()
        row = run | self._measure(run) | self.facts | {"data_sha256": digest(run["data"])}
        self.longest = max(self.longest, time.monotonic() - began)
        self.rows.append(row)
        append_line(self.args.output, row)
        print(*(run[name] for name in SHOWN), *(f"{top1:.2f}" for top1 in row["top1"]), row.get("diverged", ""),
              flush=True)
        return row

    def _measure(self, run: Row) -> Row:
        setting, method = SETTINGS[run["setting"]], METHODS[run["method"]]
        torch.manual_seed(run["seed"])
        arguments, teaching = [create_network(setting.network, setting.data), run["weight"]], {}
        if method.other == "peer":
            arguments.append(create_network(setting.network, setting.data))
        elif method.other == "teacher":
            teacher, teaching = self._teacher(run)
            arguments.append(teacher)
        return train_and_measure(method.make(*arguments), run, setting.passes, self.args) | teaching

    def _teacher(self, run: Row) -> tuple[nn.Module, Row]:
        """A wider network, trained on the same images as the plain one was, and how long that took."""
        setting = SETTINGS[run["setting"]]
        plain = self.tune(run["setting"], "plain")
        folder = self.args.output.with_suffix("")
        path = folder / f"{run['setting']}-{run['seed']}.pt"
        model = create_network(TEACHERS[setting.network], setting.data)
        if not path.exists():
            task = METHODS["plain"].make(model, None)
            facts = train_and_measure(task, {**plain, "seed": run["seed"]}, setting.passes, self.args)
            folder.mkdir(exist_ok=True)
            torch.save({"state": model.cpu().state_dict(), "facts": facts}, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["state"])
        return model.to(memory_format=torch.channels_last), {
            "teacher_seconds": saved["facts"]["seconds"], "teacher_top1": saved["facts"]["top1"][-1]}


def train_and_measure(task: TrainingTask, run: Row, passes: int, args: argparse.Namespace) -> Row:
    """Top-1 of every exit and of the ensemble after the last epoch, in per cent; time and memory of the training."""
    setting = SETTINGS[run["setting"]]
    train = load_training(setting.data, setting.per_class, run["seed"])
    measured = load_measured(setting.data, "validation" if run["phase"] == "tune" else "test")
    memory = step_memory(task, args.device)
    torch.manual_seed(run["seed"])
    with tempfile.TemporaryDirectory() as output, redirect_stdout(io.StringIO()):
        trainer = Trainer(task, ConcatDataset([train] * PASSES), Subset(measured, range(BATCH_SIZE)), TrainConfig(
            output=output, seed=run["seed"], epochs=passes // PASSES, batch_size=BATCH_SIZE, workers=0, opt="sgd",
            lr=run["lr"], weight_decay=run["weight_decay"], channels_last=True, amp=args.amp_dtype is not None,
            amp_dtype=args.amp_dtype or "float16"))
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
