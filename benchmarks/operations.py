"""How many operations does a training step launch?

Where a step is kernel-launch bound, as on a fast GPU with small networks or images, its time goes by how many
operations are launched. Counted are those of forward pass, loss and backward pass, of the self-distilled network and of
the plain one, without views, which launch nothing. Nothing is timed, so every machine gives the same figures.

    python benchmarks/operations.py
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import timm
import torch
from hardware import write_json
from rich.console import Console
from rich.table import Table
from timm.task import ClassificationTask, TrainingTask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_selfdistill import SelfDistillLoss, SelfDistillTask, wrap_self_distill

CASES = {
    "cifar_resnet18": 32,
    "resnet18": 64,
    "resnet50": 64,
    "convnext_tiny": 64,
    "vit_small_patch16_224": 224,
}
"""Networks, and the height and width of the images."""
CLASSES = 100


class LaunchedOperations(TorchDispatchMode):
    """Counts operations by their names, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.counts[str(func)] += 1
        return result


def count_step(task: TrainingTask, size: int) -> dict[str, int]:
    """Operations of forward pass, loss and backward pass."""
    x, y = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    task.train()
    arguments = [x, task.criterion.needs_features] if isinstance(task, SelfDistillTask) else [x]
    with LaunchedOperations() as forward:
        output = task.trainable_module(*arguments)
    criterion: Callable[..., Any] = task.criterion
    with LaunchedOperations() as loss:
        value = criterion(output, y)
    with LaunchedOperations() as backward:
        value.backward()
    passes = {"forward": forward, "loss": loss, "backward": backward}
    counts = {name: mode.counts.total() for name, mode in passes.items()}
    return counts | {"all": sum(counts.values())}


def measure(name: str, criterion: SelfDistillLoss) -> dict[str, Any]:
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=CLASSES)
    plain = count_step(ClassificationTask(backbone, nn.CrossEntropyLoss(), verbose=False), CASES[name])
    backbone.zero_grad()
    ours = count_step(SelfDistillTask(wrap_self_distill(backbone), criterion), CASES[name])
    return {"network": name, "plain": plain, "ours": ours, "ratio": ours["all"] / plain["all"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--paper", action="store_true", help="the loss of the paper, with its hint")
    parser.add_argument("--output", default="benchmarks/results/operations.json")
    args = parser.parse_args()
    criterion = SelfDistillLoss.paper() if args.paper else SelfDistillLoss()
    table = Table("network", "", "forward", "loss", "backward", "all", "ratio")
    rows = [measure(name, criterion) for name in args.networks]
    for row in rows:
        for kind in ("plain", "ours"):
            ratio = f"{row['ratio']:.2f}" if kind == "ours" else ""
            table.add_row(row["network"] if kind == "plain" else "", kind, *map(str, row[kind].values()), ratio)
    Console().print(table)
    write_json(args.output, "cpu", rows)


if __name__ == "__main__":
    main()
