"""Does self-distillation help where pretrained weights are fine-tuned?

EfficientNet-Lite0 with its ImageNet weights, fine-tuned on 2,000 images of Fashion-MNIST (the first 200 of each class)
in four ways: "plain", the network alone; "dsn", with the shallow classifiers but no distillation; "deepest" and
"ensemble", with distillation from either teacher, all else at its default. Each way has its learning rate chosen from
the same four, by the deepest exit's top-1 on the next 200 images of each class, with seed 0; the lower of equals. With
it, each is trained with --rounds other seeds, and measured after the last epoch on the 10,000 test images. A seed sets
the order and crops of the images and the heads, and the same seeds serve all ways, so that their differences are
paired. The backbone's new classifier begins with zeros: timm's random one is so large in EfficientNets that it spoils
the features (with it the plain network ends three points lower). Intervals are of 95 %, by Student's t over the seeds:
the images are always the same.

    apt-get install dataset-fashion-mnist
    pip install -e ".[bench,examples]"
    python benchmarks/finetune.py

Finished runs are kept in --progress: a benchmark that was stopped goes on where it was.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from fashion_mnist import CLASSES, read_idx
from hardware import create_parser, write_json
from intervals import mean_interval
from json_lines import append_line, read_lines
from PIL import Image as PILImage
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset

from timm_selfdistill import (
    SelfDistillLoss,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    model_data_config,
    wrap_self_distill,
)
from timm_selfdistill.training.outputs.metrics import measure_exits

ROOT = Path(__file__).parents[1]
LOSSES = {
    "plain": None,
    "dsn": SelfDistillLoss(alpha=0, beta=0),
    "deepest": SelfDistillLoss.paper(),
    "ensemble": SelfDistillLoss.paper(teacher="ensemble"),
}
LRS = [3e-4, 1e-3, 3e-3, 1e-2]
Row = dict[str, Any]
Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    parser = create_parser(__doc__, batch_size=32, rounds=5)
    parser.add_argument("--img-size", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--progress", type=Path, default=Path("output/finetune.jsonl"))
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, of which an interval can be told, got {args.rounds}")
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as pretrained:
        subprocess.run([sys.executable, ROOT / "examples/efficientnet_lite0.py", pretrained], check=True)
        tuned = complete([describe("tune", *point, 0, args) for point in product(LOSSES, LRS)], pretrained, args)
        best = [
            max((row for row in tuned if row["method"] == method), key=lambda row: row["top1"][-1]) for method in LOSSES
        ]
        tested = complete(
            [
                describe("test", row["method"], row["lr"], seed, args)
                for seed, row in product(range(1, args.rounds + 1), best)
            ],
            pretrained,
            args,
        )
    summary = [summarize(method, tested) for method in LOSSES]
    print_table(summary)
    write_json(args.output, args.device, tuned + tested + summary)


def describe(phase: str, method: str, lr: float, seed: int, args: argparse.Namespace) -> Row:
    """What tells a run from another."""
    return {
        "phase": phase,
        "method": method,
        "lr": lr,
        "seed": seed,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "img_size": args.img_size,
        "classifier": "zeros",
    }


def complete(runs: list[Row], pretrained: str, args: argparse.Namespace) -> list[Row]:
    """The runs, all of one phase, with their results: those of --progress, the others are done now."""
    done, rows, data = read_lines(args.progress), [], None
    for run in runs:
        row = next((row for row in done if run.items() <= row.items()), None)
        if row is None:
            data = data or load_data(run["phase"], pretrained, args.img_size)
            row = run | fine_tune(run, pretrained, *data)
            append_line(args.progress, row)
        rows.append(row)
        print(
            f"{row['phase']:<6}{row['method']:<9} lr {row['lr']:<8}seed {row['seed']:<3}{row['seconds']:>6.1f} s ",
            *(f"{top1:6.2f}" for top1 in row["top1"]),
            flush=True,
        )
    return rows


def load_data(phase: str, pretrained: str, img_size: int) -> tuple[TorchDataset, TorchDataset, Batches]:
    """Training images, and batches to measure on: of the training file in the phase "tune", else of the test file.
    Between them a hundredth of the latter, for the Trainer to look at after every epoch."""
    measured = read_images("train", 200, 400) if phase == "tune" else read_images("t10k", 0, 1000)
    images = load_images({"train": read_images("train", 0, 200), "validation": measured})
    _, data_config = create_backbone(pretrained, img_size)
    train, val = images.transformed(data_config, scale=(0.6, 1.0), hflip=0.5, color_jitter=None)
    return train, Subset(val, range(0, len(val), 100)), list(DataLoader(val, 250))


def create_backbone(pretrained: str, img_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """The pretrained network with a new classifier, and its preprocessing."""
    model = timm.create_model(f"local-dir:{pretrained}", pretrained=True, num_classes=len(CLASSES))
    nn.init.zeros_(model.get_classifier().weight)
    return model, model_data_config(model, img_size, class_names=CLASSES, crop_pct=1.0)


def read_images(prefix: str, first: int, end: int) -> Dataset:
    """Those with the numbers first..end-1 of every class."""
    images = read_idx(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz", 8)
    rows = np.concatenate([np.flatnonzero(labels == label)[first:end] for label in range(len(CLASSES))])
    return Dataset.from_dict(
        {"image": [PILImage.fromarray(images[row]) for row in rows], "label": labels[rows].tolist()},
        Features({"image": Image(), "label": ClassLabel(names=CLASSES)}),
    )


def fine_tune(run: Row, pretrained: str, train: TorchDataset, val: TorchDataset, measured: Batches) -> Row:
    """Top-1 of every exit and of the ensemble after the last epoch, in per cent."""
    began = time.perf_counter()
    torch.manual_seed(run["seed"])
    backbone, _ = create_backbone(pretrained, run["img_size"])
    loss = LOSSES[run["method"]]
    task = (
        SelfDistillTask(wrap_self_distill(backbone), loss)
        if loss
        else ClassificationTask(backbone, nn.CrossEntropyLoss(), verbose=False)
    )
    with tempfile.TemporaryDirectory() as output, redirect_stdout(io.StringIO()):
        config = TrainConfig(
            output=output,
            seed=run["seed"],
            epochs=run["epochs"],
            batch_size=run["batch_size"],
            opt="adamw",
            weight_decay=0.05,
            lr=run["lr"],
            channels_last=True,
            workers=0,
        )
        trainer = Trainer(task, train, val, config)
        if trainer.fit().interrupted_by:
            sys.exit("stopped; the same command goes on")
    metrics, _ = measure_exits(trainer.eval_model, measured, trainer.accelerator)
    return {
        "top1": [metric.top1 for metric in metrics if metric.exit != "ensemble"],
        "ensemble": next((metric.top1 for metric in metrics if metric.exit == "ensemble"), None),
        "seconds": round(time.perf_counter() - began, 1),
    }


def summarize(method: str, rows: list[Row]) -> Row:
    """Means over the seeds and the halves of their intervals; differences are those of the deepest exit, in points."""
    own = [row for row in rows if row["method"] == method]
    exits = [mean_interval(column) for column in zip(*(row["top1"] for row in own))]
    summary = {
        "phase": "summary",
        "method": method,
        "lr": own[0]["lr"],
        "seeds": len(own),
        "top1": exits,
        "ensemble": mean_interval([row["ensemble"] for row in own]) if len(exits) > 1 else None,
    }
    for other in ("plain", "dsn"):
        pairs = zip(own, (row for row in rows if row["method"] == other), strict=True)  # both in the order of the seeds
        differences = [row["top1"][-1] - base["top1"][-1] for row, base in pairs]
        summary[f"minus_{other}"] = mean_interval(differences) if method != other else None
    return summary


def print_table(summary: list[Row]) -> None:
    def cell(value: tuple[float, float] | None, sign: str = "") -> str:
        return f"{value[0]:{sign}.2f} ± {value[1]:.2f}" if value else "-"

    print("\n| method | lr | exits, shallow to deep | ensemble | deepest - plain | deepest - dsn |")
    print("|---|---|---|---|---|---|")
    for row in summary:
        cells = [
            row["method"],
            str(row["lr"]),
            ", ".join(map(cell, row["top1"])),
            cell(row["ensemble"]),
            cell(row["minus_plain"], "+"),
            cell(row["minus_dsn"], "+"),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
