"""What is early exit worth, batch by batch?

A network with random weights, random images, and thresholds at which a known share of the images leaves: 0, 25, 50, 75
or 100 % at the first exit, or at each exit half of what is left ("mixed"). "ideal" is what the images would cost if
each took the measured time per image, at that batch size, of the stages that it runs and of their heads. earlyon
0.3.0's `custom_ee` is wrapped around the same backbone, with thresholds for the same shares: "batched" (the hardest
image of a batch decides for all) and "one by one". Its heads are pooling and two small linear layers, which cost less
than ours. All in turn, medians of ratios.

    pip install -e ".[bench]"
    export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
    python benchmarks/early_exit.py

The two variables let glibc keep large buffers; without them every layer's are taken from the system anew, which makes
large batches slower for all, the plain network included.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import timm
import torch
from earlyon.models import custom_ee
from hardware import create_parser, write_json
from timing import interleaved, median_ratio
from torch import Tensor

from timm_selfdistill import EarlyExit, SelfDistillModel, wrap_self_distill
from timm_selfdistill.heads import HEADS

NETWORKS = {"resnet18": {}, "resnet50": {}, "convnext_tiny": {}, "vit_small_patch16_224": {"img_size": 112}}
CASES: dict[str, float | None] = {"0 %": 0.0, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "100 %": 1.0, "mixed": None}
SINGLES = 16
"""Images of a round at batch size 1."""


def main() -> None:
    parser = create_parser(__doc__, batch_size=128, rounds=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="a batch size at least, where rounds are short")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS))
    parser.add_argument("--img-size", type=int, default=112)
    parser.add_argument("--head", default="bottleneck", choices=HEADS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(
        f"{'network':<24}{'batch':>6}{'leave':>7}{'plain ms':>10}{'ours ms':>9}{'speed-up':>10}{'of ideal':>10}"
        f"{'earlyon batched':>17}{'one by one':>12}"
    )
    for name in args.models:
        torch.manual_seed(0)
        backbone = timm.create_model(name, num_classes=100, **NETWORKS.get(name, {})).to(args.device).eval()
        model = wrap_self_distill(backbone, head=args.head, model_args=NETWORKS.get(name)).eval()
        for batch in sorted({1, 16, args.batch_size}):
            count = max(batch, SINGLES)
            x = torch.randn(count, 3, args.img_size, args.img_size, device=args.device)
            x *= torch.linspace(0.2, 2, count, device=args.device)[torch.randperm(count), None, None, None]
            with torch.no_grad():
                for row in compare(model, x, batch, args.rounds, args.seconds):
                    rows.append(
                        {"network": name, "head": args.head, "img_size": args.img_size, "batch_size": batch, **row}
                    )
                    print(
                        f"{name:<24}{batch:>6}{row['leave']:>7}{row['plain_ms']:>10.1f}{row['ours_ms']:>9.1f}"
                        f"{row['speedup']:>10.2f}{row['of_ideal']:>10.2f}{row['over_earlyon_batched']:>16.2f}x"
                        f"{row['over_earlyon_single']:>11.2f}x",
                        flush=True,
                    )
    write_json(args.output, args.device, rows)


def compare(model: SelfDistillModel, x: Tensor, batch: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each case, for images x in batches."""
    batches, exits = x.split(batch), len(model.stages)
    maps = [
        model.backbone.forward_intermediates(
            part, indices=[stage.index for stage in model.stages], intermediates_only=True
        )
        for part in batches
    ]
    other = custom_ee(model.backbone, list(model.exits[:-1]), 100, input_shape=(1, *x.shape[1:])).eval()
    ours, confidence = EarlyExit(model, 1.0), own_confidence(model, x)
    other_confidence = [part.softmax(1).amax(1) for part in other(x, mode="training")[:-1]]
    parts = [  # of the network, each with all batches
        *(lambda exit=exit: [model.predict(part, exit) for part in batches] for exit in range(exits)),
        *(lambda exit=exit: [model.heads[exit](part[exit]) for part in maps] for exit in range(exits)),
    ]

    def with_thresholds(case: str) -> list[Callable[[], object]]:
        mine, theirs = find_thresholds(confidence, CASES[case]), find_thresholds(other_confidence, CASES[case])

        def run_ours() -> None:
            ours.thresholds = mine
            for part in batches:
                ours.predict(part)

        def run_batched() -> None:
            other.config.confidence_thresholds = theirs
            for part in batches:
                other.forward_inference_batched(part)

        def run_single() -> None:
            other.config.confidence_thresholds = theirs
            for image in x.split(1):
                other(image)

        return [run_ours, run_batched, run_single]

    calls = [call for case in CASES for call in with_thresholds(case)]
    times = interleaved(
        [lambda: [model.backbone(part) for part in batches], *parts, *calls], rounds, seconds, warm_up=1
    )
    rows = []
    for index, case in enumerate(CASES):
        ours.thresholds = find_thresholds(confidence, CASES[case])
        taken = torch.cat([ours.predict(part).exit for part in batches])
        shares = [float((taken == exit).double().mean()) for exit in range(exits + 1)]
        of_case = times[1 + 2 * exits + 3 * index :][:3]
        rows.append({"leave": case, "shares": shares, **figures(shares, times[: 1 + 2 * exits], *of_case)})
    return rows


def figures(
    shares: list[float], parts: list[list[float]], mine: list[float], batched: list[float], single: list[float]
) -> dict[str, float]:
    """Medians in milliseconds, and their ratios.

    Args:
        shares: of the images that leave at each exit.
        parts: times of the plain network, of the network up to each exit, and of each head.
        mine, batched, single: times of ours, and of earlyon with batches and with single images.
    """
    plain, exits = parts[0], len(parts) // 2
    networks, heads = parts[1 : 1 + exits], parts[1 + exits :]
    ideal = [ideal_time(shares, *round) for round in zip(plain, zip(*networks), zip(*heads))]
    return {
        "plain_ms": median(plain),
        "ours_ms": median(mine),
        "speedup": median_ratio(plain, mine),
        "ideal_ms": median(ideal),
        "of_ideal": median_ratio(ideal, mine),
        "earlyon_batched_ms": median(batched),
        "earlyon_single_ms": median(single),
        "over_earlyon_batched": median_ratio(batched, mine),
        "over_earlyon_single": median_ratio(single, mine),
    }


def own_confidence(model: SelfDistillModel, x: Tensor) -> list[Tensor]:
    return [logits.softmax(1).amax(1) for logits in model.forward_exits(x).logits[:-1]]


def find_thresholds(confidence: list[Tensor], share: float | None) -> list[float]:
    """Thresholds between images: at the first exit a share leaves and at the others nobody; None: half at each."""
    left = torch.ones_like(confidence[0], dtype=torch.bool)
    thresholds = []
    for exit, part in enumerate(confidence):
        leaving = round(int(left.sum()) * (0.5 if share is None else share if exit == 0 else 0))
        values = part[left].sort(descending=True).values.tolist()
        if leaving == 0:
            thresholds.append(1.0)
        elif leaving == len(values):
            thresholds.append(0.0)
        else:
            thresholds.append((values[leaving - 1] + values[leaving]) / 2)
        left &= part < thresholds[-1]
    return thresholds


def ideal_time(shares: list[float], plain: float, networks: tuple[float, ...], heads: tuple[float, ...]) -> float:
    """If each image took its share of the measured times; `networks` are stages and one head."""
    passed, total = 0.0, 0.0
    for share, network, head in zip(shares, networks, heads):
        passed += head
        total += share * (network - head + passed)
    return total + shares[-1] * (plain + passed)


if __name__ == "__main__":
    main()
