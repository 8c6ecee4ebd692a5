"""How fast is each exit alone, and does `truncate` add anything to the layers that it needs?

Latency of `model.truncate(exit)` against the plain network, and against the backbone's own layers up to there, stopped
by an exception in a hook, and the head; random weights and images, all in turn, medians.

    python benchmarks/exits.py
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from hardware import create_parser, write_json
from timing import interleaved, median_ratio
from torch import Tensor, nn

from timm_selfdistill import SelfDistillModel, wrap_self_distill

NETWORKS = ["resnet18", "resnet50", "convnext_tiny", "vit_small_patch16_224"]


class Stop(Exception):
    """The stage's output is there."""


def main() -> None:
    parser = create_parser(__doc__, batch_size=32, rounds=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="a network at least, where rounds are short")
    parser.add_argument("--models", nargs="+", default=NETWORKS)
    parser.add_argument("--img-size", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{'network':<24}{'batch':>6}{'exit':>5}{'plain ms':>10}{'exit ms':>10}{'speed-up':>10}{'own layers':>12}")
    for name in args.models:
        torch.manual_seed(0)
        model = wrap_self_distill(timm.create_model(name, num_classes=100).to(args.device)).eval()
        for batch in (1, args.batch_size):
            x = torch.randn(batch, 3, args.img_size, args.img_size, device=args.device)
            for row in measure(model, x, args.rounds, args.seconds):
                rows.append({"network": name, "img_size": args.img_size, "batch_size": batch, **row})
                print(
                    f"{name:<24}{batch:>6}{row['exit']:>5}{row['plain_ms']:>10.1f}{row['exit_ms']:>10.1f}"
                    f"{row['speedup']:>10.2f}{row['over_own_layers']:>12.3f}",
                    flush=True,
                )
    write_json(args.output, args.device, rows)


@torch.no_grad()
def measure(model: SelfDistillModel, x: Tensor, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each shallow exit."""
    exits = range(len(model.stages))
    calls = [model.backbone, *(model.truncate(exit) for exit in exits), *(own_layers(model, exit) for exit in exits)]
    plain, *times = interleaved([partial(call, x) for call in calls], rounds, seconds)
    return [
        {
            "exit": exit,
            "plain_ms": median(plain),
            "exit_ms": median(ours),
            "speedup": median_ratio(plain, ours),
            "over_own_layers": median_ratio(ours, own),
        }
        for exit, ours, own in zip(exits, times, times[len(exits) :])
    ]


def own_layers(model: SelfDistillModel, exit: int) -> Callable[[Tensor], Tensor]:
    """The backbone's forward up to a stage, and the head on the feature map."""
    module = model.backbone.get_submodule(model.stages[exit].name)
    found = []

    def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
        found.append(output)
        raise Stop

    def call(x: Tensor) -> Tensor:
        handle = module.register_forward_hook(hook)
        try:
            model.backbone(x)
        except Stop:
            pass
        finally:
            handle.remove()
        return model.heads[exit](to_map(found.pop(), x))[0]

    def to_map(output: Tensor, x: Tensor) -> Tensor:
        if output.ndim == 4:
            return output
        side = x.shape[-1] // model.stages[exit].reduction  # a ViT's tokens, behind its class token
        return output[:, -side * side :].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    return call


if __name__ == "__main__":
    main()
