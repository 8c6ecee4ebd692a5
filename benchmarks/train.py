"""How fast does training run?

Images per second of an epoch, all in turn, medians: `Trainer` with the self-distilled network and with the plain one,
timm's own training step (`timm.task.ClassificationTask` in a bare loop, with timm's loader), and the same loop with the
network of the authors' code. Images are those of examples/data at --img-size, or random tensors (--synthetic, where
decoding would set the pace). Evaluation and saving are not done. Memory is the peak of the epoch on a GPU; on a CPU,
where a process's memory says little, it is counted: weights, gradients, momentum, and all that the backward pass needs.

    python benchmarks/train.py
    python benchmarks/train.py --amp-dtype bfloat16 --output benchmarks/results/train_bf16.json
    python benchmarks/train.py --device cuda --synthetic --img-size 128 -b 256 -j 12 --images 10240 \\
        --amp-dtype bfloat16 --channels-last
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
from authors_network import AuthorsTask
from hardware import create_parser, write_json
from timing import median_ratio
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from timm_selfdistill import (
    SelfDistillLoss,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    model_data_config,
    wrap_self_distill,
)
from timm_selfdistill.cost import count_cost

IMAGES = Path(__file__).parents[1] / "examples/data"
CLASSES = 10
Measured = tuple[float, float]
"""Milliseconds an image, and GiB."""


class RandomImages(Dataset):
    """Random tensors (3, size, size) as quickly as they can be had."""

    def __init__(self, count: int, size: int):
        self.count, self.pool = count, torch.randn(64, 3, size, size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pool[index % len(self.pool)], index % CLASSES


def main() -> None:
    parser = create_parser(__doc__, batch_size=32, rounds=7)
    parser.add_argument("-j", "--workers", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--amp-dtype", choices=["float16", "bfloat16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--torchcompile", action="store_true")
    parser.add_argument("--paper", action="store_true", help="the loss of the paper, with its hint")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(
        f"{'network':<18}{'timm img/s':>12}{'plain':>8}{'of timm':>9}{'ours':>8}{'time':>8}{'/ MACs':>8}"
        f"{'authors':>9}{'memory':>8}"
    )
    for name in args.models:
        row = compare(name, args)
        rows.append(
            {
                "network": name,
                **{
                    key: value
                    for key, value in vars(args).items()
                    if key not in ("models", "output", "rounds", "device", "threads")
                },
                **row,
            }
        )
        print(
            f"{name:<18}{row['timm_images_per_second']:>12.0f}{row['plain_images_per_second']:>8.0f}"
            f"{row['plain_over_timm']:>9.3f}{row['ours_images_per_second']:>8.0f}{row['time_ratio']:>8.3f}"
            f"{row['time_over_macs']:>8.3f}{row['authors_time_ratio']:>9.3f}{row['memory_ratio']:>8.3f}",
            flush=True,
        )
    write_json(args.output, args.device, rows)


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    contenders: dict[str, Callable[[], Measured]] = {
        "timm": lambda: bare_loop(ClassificationTask(create(name, args), nn.CrossEntropyLoss(), verbose=False), args),
        "plain": lambda: with_trainer(
            ClassificationTask(create(name, args), nn.CrossEntropyLoss(), verbose=False), args
        ),
        "ours": lambda: with_trainer(
            SelfDistillTask(wrap_self_distill(create(name, args)), create_criterion(args)), args
        ),
        "authors": lambda: bare_loop(AuthorsTask(name, CLASSES), args),
    }
    times: dict[str, list[float]] = {key: [] for key in contenders}
    memory: dict[str, list[float]] = {key: [] for key in contenders}
    for number in range(args.rounds + 1):
        for key, run in contenders.items():
            gc.collect()
            milliseconds, gib = run()
            if number:  # the first is for warming up
                times[key].append(milliseconds)
                memory[key].append(gib)
    model = wrap_self_distill(create(name, args))
    size = (3, args.img_size, args.img_size)
    with_features = create_criterion(args).needs_features
    macs = [
        count_cost(model.backbone, size).macs,
        count_cost(model, size, lambda m, x: m.forward_exits(x, with_features)).macs,
    ]
    ratio = median_ratio(times["ours"], times["plain"])
    return {
        **{f"{key}_images_per_second": 1000 / median(values) for key, values in times.items()},
        **{f"{key}_gib": median(values) for key, values in memory.items()},
        "plain_over_timm": median_ratio(times["timm"], times["plain"]),
        "time_ratio": ratio,
        "macs_ratio": macs[1] / macs[0],
        "time_over_macs": ratio * macs[0] / macs[1],
        "authors_time_ratio": median_ratio(times["authors"], times["timm"]),
        "memory_ratio": median(memory["ours"]) / median(memory["plain"]),
    }


def create_criterion(args: argparse.Namespace) -> SelfDistillLoss:
    return SelfDistillLoss.paper() if args.paper else SelfDistillLoss()


def create(name: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    model_data_config(model, args.img_size, 3)
    return model


def images(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """For training, so many images, and a few for validation."""
    if args.synthetic:
        return RandomImages(args.images, args.img_size), RandomImages(64, args.img_size)
    config = model_data_config(timm.create_model("test_resnet"), args.img_size, 3)
    train, val = load_images(IMAGES).transformed(config, color_jitter=None)
    return Subset(train, range(args.images)), Subset(val, range(64))


def timm_loader(args: argparse.Namespace) -> DataLoader:
    train, _ = images(args)
    if args.synthetic:
        return DataLoader(
            train,
            args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            pin_memory=args.device == "cuda",
        )
    rows, subset = train.dataset, train
    loader = create_loader(
        subset,
        (3, args.img_size, args.img_size),
        args.batch_size,
        is_training=True,
        num_workers=args.workers,
        scale=(0.5, 1.0),
        color_jitter=None,
        hflip=0.5,
        use_prefetcher=args.device == "cuda",
        device=torch.device(args.device),
    )
    rows.transform = subset.transform  # create_loader sets it on what it is given
    return loader


def bare_loop(task: TrainingTask, args: argparse.Namespace) -> Measured:
    """The loop of timm's train.py, without its logs."""
    device, loader = torch.device(args.device), timm_loader(args)
    task.to(device).train()
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.torchcompile:
        task.get_trainable_module().compile()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.05, weight_decay=5e-4)
    amp_dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    watch_memory(device)
    began, count = time.perf_counter(), 0
    for step, (x, y) in enumerate(loader):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            loss = task(x, y)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        count += len(x)
        if step % 50 == 49:
            loss.item()
    loss.item()
    return 1000 * (time.perf_counter() - began) / count, gib_of_epoch(task, args)


def with_trainer(task: TrainingTask, args: argparse.Namespace) -> Measured:
    train, val = images(args)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output=folder,
            epochs=1,
            batch_size=args.batch_size,
            workers=args.workers,
            warmup_epochs=0,
            amp=args.amp_dtype is not None,
            amp_dtype=args.amp_dtype or "float16",
            channels_last=args.channels_last,
            torchcompile=args.torchcompile,
        )
        trainer = Trainer(task, train, val, config)
        watch_memory(trainer.accelerator.device)

        def end() -> None:
            raise EndOfEpoch

        trainer._finish_epoch = end
        with redirect_stdout(io.StringIO()), suppress(EndOfEpoch):
            trainer.fit()
        return 1000 / trainer.rate, gib_of_epoch(task, args)


class EndOfEpoch(Exception):
    """Raised in place of the evaluation."""


def watch_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gib_of_epoch(task: TrainingTask, args: argparse.Namespace) -> float:
    """The peak of an epoch since `watch_memory`, or what a step on a CPU holds on to."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    tensors: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            result = task(x, torch.zeros(len(x), dtype=torch.long))
    weights = {weight.untyped_storage().data_ptr(): weight.nbytes for weight in task.parameters()}
    return (sum((tensors | weights).values()) + 2 * sum(weights.values()) + result["loss"].nbytes) / 2**30


if __name__ == "__main__":
    main()
