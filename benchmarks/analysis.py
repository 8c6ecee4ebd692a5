"""What do the analyses add to the forward passes that they need?

Time of separability, of agreement, and of flat-minima with one draw of one level (two passes), over that of as many
passes of `forward_exits` alone, on the same batches in memory; random weights and images, all in turn, medians of the
rounds.

    python benchmarks/analysis.py                       # 10,000 images of 32 px; about 8 minutes on one core
"""

from functools import partial
from statistics import median
from typing import Any

import timm
import torch
from hardware import create_parser, write_json
from timing import interleaved, median_ratio
from torch import Tensor

from timm_selfdistill import SelfDistillModel, wrap_self_distill
from timm_selfdistill.analysis import measure_agreement, measure_flatness, measure_separability


def main() -> None:
    parser = create_parser(__doc__, batch_size=64, rounds=5)
    parser.add_argument("--models", nargs="+", default=["resnet18"])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--num-classes", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{'network':<24}{'analysis':<16}{'forward s':>10}{'analysis s':>12}{'ratio':>8}")
    for name in args.models:
        torch.manual_seed(0)
        model = wrap_self_distill(timm.create_model(name, num_classes=args.num_classes).to(args.device)).eval()
        x = torch.randn(args.images, 3, args.img_size, args.img_size)
        y = torch.arange(args.images) % args.num_classes
        batches = list(zip(x.split(args.batch_size), y.split(args.batch_size)))
        for row in measure(model, batches, args.rounds):
            rows.append(
                {
                    "network": name,
                    "images": args.images,
                    "img_size": args.img_size,
                    "batch_size": args.batch_size,
                    "num_classes": args.num_classes,
                    **row,
                }
            )
            print(
                f"{name:<24}{row['analysis']:<16}{row['forward_s']:>10.2f}{row['analysis_s']:>12.2f}"
                f"{row['ratio']:>8.3f}",
                flush=True,
            )
    write_json(args.output, args.device, rows)


def measure(model: SelfDistillModel, batches: list[tuple[Tensor, Tensor]], rounds: int) -> list[dict[str, Any]]:
    """A row for each analysis."""
    device = next(model.parameters()).device

    def forward() -> None:
        with torch.no_grad():
            for x, _ in batches:
                model.forward_exits(x.to(device))

    analyses = {
        "separability": (measure_separability, 1),
        "agreement": (measure_agreement, 1),
        "flat-minima": (partial(measure_flatness, levels=[0.1], draws=1), 2),
    }
    plain, *times = interleaved(
        [forward, *(partial(analysis, model, batches) for analysis, _ in analyses.values())],
        rounds,
        seconds=0,
        warm_up=1,
    )
    rows = []
    for (name, (_, passes)), ours in zip(analyses.items(), times):
        forwards = [passes * time for time in plain]
        rows.append(
            {
                "analysis": name,
                "passes": passes,
                "forward_s": median(forwards) / 1000,
                "analysis_s": median(ours) / 1000,
                "ratio": median_ratio(ours, forwards),
            }
        )
    return rows


if __name__ == "__main__":
    main()
