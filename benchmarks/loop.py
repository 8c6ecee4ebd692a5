"""What does the training loop add?

Images per second of `Trainer` with timm's `ClassificationTask` over those of a loop written by hand, on the same
network, images and loader: an epoch of each in turn, medians. Evaluation and saving are not counted.

    python benchmarks/loop.py                       # the figures of the README
    python benchmarks/loop.py --device cuda -b 256 -j 8
"""
import argparse
import io
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import timm
import torch
from hardware import create_parser, write_json
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from timm_selfdistill import TrainConfig, Trainer, load_images, model_data_config

IMAGES = Path(__file__).parents[1] / "examples/data"


def main() -> None:
    parser = create_parser(__doc__, batch_size=64, rounds=7)
    parser.add_argument("-j", "--workers", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["test_resnet", "resnet18"])
    parser.add_argument("--images", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{'network':<16}{'by hand img/s':>15}{'Trainer img/s':>15}{'ratio':>8}")
    for name in args.models:
        images = load_images(IMAGES)
        config = model_data_config(create(name), 32, 1)
        train, val = images.transformed(config, color_jitter=None)
        train, val = Subset(train, range(args.images)), Subset(val, range(64))
        pairs = []
        for _ in range(args.rounds + 1):  # the first is for warming up
            by_hand = hand_written(create(name), train, args)
            pairs.append((by_hand, with_trainer(create(name), train, val, args)))
        by_hand, ours = (statistics.median(rates) for rates in zip(*pairs[1:]))
        ratio = statistics.median(b / a for a, b in pairs[1:])
        rows.append({"network": name, "batch_size": args.batch_size, "workers": args.workers,
                     "by_hand_images_per_second": by_hand, "trainer_images_per_second": ours, "ratio": ratio})
        print(f"{name:<16}{by_hand:>15.0f}{ours:>15.0f}{ratio:>8.3f}")
    write_json(args.output, args.device, rows)


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, in_chans=1)
    model_data_config(model, 32, 1)
    return model


def hand_written(model: nn.Module, data: Dataset, args: argparse.Namespace) -> float:
    """Images per second of the loop that everybody writes."""
    device = torch.device(args.device)
    model.to(device).train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(data, args.batch_size, sampler=RandomSampler(data), drop_last=True, num_workers=args.workers,
                        pin_memory=device.type == "cuda")
    began, count = time.perf_counter(), 0
    for step, (x, y) in enumerate(loader):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        count += len(x)
        if step % 50 == 49:
            loss.item()
    loss.item()
    return count / (time.perf_counter() - began)


def with_trainer(model: nn.Module, train: Dataset, val: Dataset, args: argparse.Namespace) -> float:
    """Images per second of the same epoch in the `Trainer`."""
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(output=folder, epochs=1, batch_size=args.batch_size, workers=args.workers, warmup_epochs=0)
        trainer = Trainer(task, train, val, config)
        with redirect_stdout(io.StringIO()):
            trainer.fit()
        return trainer.rate


if __name__ == "__main__":
    main()
