"""What does it cost to train exits on a backbone that is frozen?

Milliseconds an image of an epoch of `Trainer`, all in turn on the same real images (those of examples/data at
--img-size), medians:

- over a forward pass of the plain network over the same images plus the heads' own forward and backward passes;
- with `cache_features`, the second epoch over the heads alone: forward, backward and update on features in memory.

Memory is the peak of a training step over that of inference at the same batch size: on a GPU as allocated, on a CPU the
largest sum of the tensors that live at one time, weights included.

    python benchmarks/frozen.py
    python benchmarks/frozen.py --img-size 224 --images 64 --output benchmarks/results/frozen_224.json
"""

import argparse
import gc
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from hardware import create_parser, write_json
from memory import peak_memory
from timing import median_ratio
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from timm_selfdistill import (
    SelfDistillLoss,
    SelfDistillModel,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    model_data_config,
    wrap_self_distill,
)
from timm_selfdistill.task import ExitHeads

IMAGES = Path(__file__).parents[1] / "examples/data"
CLASSES = 10


class EndOfRun(Exception):
    """Raised in place of an evaluation."""


def main() -> None:
    parser = create_parser(__doc__, batch_size=32, rounds=7)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--img-size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(
        f"{'network':<12}{'forward ms':>12}{'heads':>8}{'frozen':>8}{'ratio':>8}{'cached':>8}{'heads':>8}{'ratio':>8}"
        f"{'memory':>8}"
    )
    for name in args.models:
        row = measure(name, args)
        rows.append(
            {"network": name, "batch_size": args.batch_size, "images": args.images, "img_size": args.img_size, **row}
        )
        print(
            f"{name:<12}{row['forward_ms']:>12.2f}{row['heads_ms']:>8.2f}{row['frozen_ms']:>8.2f}"
            f"{row['frozen_ratio']:>8.3f}{row['cached_ms']:>8.2f}{row['heads_update_ms']:>8.2f}"
            f"{row['cached_ratio']:>8.3f}{row['memory_ratio']:>8.3f}",
            flush=True,
        )
    write_json(args.output, args.device, rows)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    memory_ratio = step_memory(name, args) / inference_memory(name, args)  # while nothing else is on the device
    data = images(name, args)
    model = create(name, args).to(args.device).train()
    features = [(model.forward_backbone(x.to(args.device)), y.to(args.device)) for x, y in batches(data, args)]
    contenders: dict[str, Callable[[], None]] = {
        "forward": lambda: forward(model.backbone, batches(data, args), args),
        "heads": lambda: train_heads(model, features, None),
        "heads_update": lambda: train_heads(
            model, features, torch.optim.SGD(model.heads.parameters(), lr=0.01, momentum=0.9)
        ),
    }
    times: dict[str, list[float]] = {key: [] for key in (*contenders, "frozen", "cached")}
    for number in range(args.rounds + 1):
        gc.collect()
        for key, call in contenders.items():
            began = time.perf_counter()
            call()
            synchronize(args.device)
            times[key].append(1000 * (time.perf_counter() - began) / args.images)
        times["frozen"].append(epoch(create(name, args), data, args, cache=False))
        times["cached"].append(epoch(create(name, args), data, args, cache=True))
        if not number:  # the first is for warming up
            times = {key: [] for key in times}
    expected = [sum(pair) for pair in zip(times["forward"], times["heads"])]
    return {
        **{f"{key}_ms": median(values) for key, values in times.items()},
        "frozen_ratio": median_ratio(times["frozen"], expected),
        "cached_ratio": median_ratio(times["cached"], times["heads_update"]),
        "memory_ratio": memory_ratio,
    }


def create(name: str, args: argparse.Namespace) -> SelfDistillModel:
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=CLASSES)
    model_data_config(backbone, args.img_size, 3)
    return wrap_self_distill(backbone, freeze_backbone=True)


def images(name: str, args: argparse.Namespace) -> Dataset:
    config = model_data_config(timm.create_model(name), args.img_size, 3)
    train, _ = load_images(IMAGES).transformed(config, no_aug=True)
    return Subset(train, range(args.images))


def batches(data: Dataset, args: argparse.Namespace) -> DataLoader:
    return DataLoader(data, args.batch_size, pin_memory=args.device == "cuda")


@torch.no_grad()
def forward(backbone: nn.Module, loader: DataLoader, args: argparse.Namespace) -> None:
    for x, _ in loader:
        backbone(x.to(args.device, non_blocking=True))


def train_heads(model: SelfDistillModel, features: list[Any], optimizer: torch.optim.Optimizer | None) -> None:
    criterion = SelfDistillLoss.paper()
    heads = ExitHeads(model)
    for x, y in features:
        criterion(heads(x), y).backward()
        if optimizer:
            optimizer.step()
        model.zero_grad()


def epoch(model: SelfDistillModel, data: Dataset, args: argparse.Namespace, cache: bool) -> float:
    """Milliseconds an image of an epoch, with a cache of the second."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            SelfDistillTask(model),
            data,
            Subset(data, range(1)),
            TrainConfig(
                output=folder, epochs=3, batch_size=args.batch_size, workers=0, warmup_epochs=0, cache_features=cache
            ),
        )

        def go_on() -> None:
            if trainer.state.epoch == cache:
                raise EndOfRun
            trainer.state.epoch, trainer.state.images = 1, 0

        trainer._finish_epoch = go_on
        with redirect_stdout(io.StringIO()), suppress(EndOfRun):
            trainer.fit()
        return 1000 / trainer.rate


def inference_memory(name: str, args: argparse.Namespace) -> float:
    backbone = create(name, args).backbone.to(args.device).eval()
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    with torch.no_grad():
        return peak_memory(backbone, lambda: backbone(x), args.device)


def step_memory(name: str, args: argparse.Namespace) -> float:
    """Of a step as `Trainer` makes it: forward, loss, backward, update."""
    model = create(name, args).to(args.device).train()
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    y = torch.zeros(args.batch_size, dtype=torch.long, device=args.device)
    criterion, optimizer = SelfDistillLoss.paper(), torch.optim.SGD(model.heads.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the momentum
    momentum = sum(state["momentum_buffer"].nbytes for state in optimizer.state.values())
    return peak_memory(model, step, args.device) + (0 if args.device == "cuda" else momentum)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
