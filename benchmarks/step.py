"""What does self distillation add to a training step?

Time of forward, loss, backward and SGD update of the self-distilled network over the plain one's, the two in turn,
medians; beside it the ratio of their multiply-adds. On a GPU ten steps are timed at once: as in training, the processor
runs ahead of it.

    python benchmarks/step.py                       # one core, the figures of the README
    python benchmarks/step.py --device cuda --amp-dtype bfloat16 --batch-size 128 --channels-last --torchcompile
"""

import argparse
import copy
from collections.abc import Callable
from statistics import median

import timm
import torch
from hardware import create_parser, write_json
from timing import interleaved, median_ratio
from timm.task import ClassificationTask
from torch import nn

from timm_selfdistill import SelfDistillLoss, SelfDistillTask, wrap_self_distill
from timm_selfdistill.cost import count_cost
from timm_selfdistill.heads import HEADS

CASES = {
    "cifar_resnet18, 32 px": ("cifar_resnet18", 32),
    "resnet18, 32 px": ("resnet18", 32),
    "resnet18, 224 px": ("resnet18", 224),
    "resnet50, 32 px": ("resnet50", 32),
    "resnet50, 224 px": ("resnet50", 224),
}

STEPS_ON_GPU = 10


def main() -> None:
    parser = create_parser(__doc__, batch_size=32, rounds=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="a network at least, where rounds are short")
    parser.add_argument("--head", default="bottleneck", choices=HEADS)
    parser.add_argument("--amp-dtype", choices=["float16", "bfloat16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--torchcompile", action="store_true")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--paper", action="store_true", help="the loss of the paper, with its hint")
    args = parser.parse_args()
    criterion = SelfDistillLoss.paper() if args.paper else SelfDistillLoss()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{'network':<28}{'plain ms':>10}{'ours ms':>10}{'time':>8}{'MACs':>8}{'time / MACs':>13}")
    for name in args.cases:
        network, size = CASES[name]
        torch.manual_seed(0)
        backbone = timm.create_model(network, num_classes=100).to(args.device)
        plain_task = ClassificationTask(copy.deepcopy(backbone), nn.CrossEntropyLoss(), verbose=False)
        model = wrap_self_distill(backbone, head=args.head)
        steps = [make_steps(task, size, args) for task in (plain_task, SelfDistillTask(model, criterion))]
        times = interleaved(steps, args.rounds, args.seconds)
        plain, ours = (median(record) / (STEPS_ON_GPU if args.device == "cuda" else 1) for record in times)
        macs = [
            count_cost(model.backbone, (3, size, size)).macs,
            count_cost(model, (3, size, size), lambda m, x: m.forward_exits(x, criterion.needs_features)).macs,
        ]
        row = {
            "network": name,
            "head": args.head,
            "loss": repr(criterion),
            "batch_size": args.batch_size,
            "amp_dtype": args.amp_dtype,
            "channels_last": args.channels_last,
            "torchcompile": args.torchcompile,
            "plain_ms": plain,
            "ours_ms": ours,
            "time_ratio": median_ratio(times[1], times[0]),
            "macs_ratio": macs[1] / macs[0],
        }
        row["time_over_macs"] = row["time_ratio"] / row["macs_ratio"]
        rows.append(row)
        print(
            f"{name:<28}{plain:>10.1f}{ours:>10.1f}{row['time_ratio']:>8.3f}{row['macs_ratio']:>8.3f}"
            f"{row['time_over_macs']:>13.3f}"
        )
    write_json(args.output, args.device, rows)


def make_steps(task: nn.Module, size: int, args: argparse.Namespace) -> Callable[[], None]:
    """Whole training steps on fixed random images."""
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    x = torch.randn(args.batch_size, 3, size, size, device=args.device)
    y = torch.randint(100, (args.batch_size,), device=args.device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if args.torchcompile:
        task.compile()
    amp_dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None

    def steps() -> None:
        for _ in range(STEPS_ON_GPU if x.is_cuda else 1):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                loss = task(x, y)["loss"]
            loss.backward()
            optimizer.step()

    return steps


if __name__ == "__main__":
    main()
