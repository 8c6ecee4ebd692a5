"""How good early exit is on data, and what other thresholds would give."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cost import measure_speedups
from ..hub import CurvePoint
from .batch_run import EarlyExitOutput
from .calibration import Answers, collect_logits
from .early_exit import EarlyExit
from .policy import find_policy
from .thresholds import simulate

POINTS = 21
AVERAGED = 16
NOISE = 1.02


def predict_all(early_exit: EarlyExit, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[EarlyExitOutput, Tensor]:
    """Answers for all images of a loader, and their labels (N,), on the CPU."""
    device = next(early_exit.model.parameters()).device
    outputs, labels = [], []
    for x, y in loader:
        outputs.append([part.cpu() for part in early_exit.predict(x.to(device))])
        labels.append(y)
    return EarlyExitOutput(*map(torch.cat, zip(*outputs))), torch.cat(labels)


def speedups_by_batch(early_exit: EarlyExit, x: Tensor, seconds: float = 1.0) -> dict[int, float]:
    """Time of the plain network over that of early exit, by the number of images in a batch: powers of two up to all of
    x (B, C, H, W). Small batches are measured as the average over up to 16 different images.

    Args:
        seconds: for each size of batch.
    """
    found = {}
    for size in (2**power for power in range(len(x).bit_length())):
        images = x[: max(size, AVERAGED)]

        plain, early = (partial(_in_batches, model, size) for model in (early_exit.model.backbone, early_exit.predict))
        (found[size],) = measure_speedups(early_exit.model, plain, [early], images, seconds=seconds)
    return found


def _in_batches(model: Callable[[Tensor], Any], size: int, x: Tensor) -> None:
    for part in x.split(size):
        model(part)


def smallest_that_pays(speedups: dict[int, float]) -> int | None:
    """The smallest batch from which on early exit is faster than the plain network, beyond noise, at every measured
    size."""
    smallest = None
    for size in sorted(speedups, reverse=True):
        if speedups[size] <= NOISE:
            break
        smallest = size
    return smallest


def trace_curve(
    early_exit: EarlyExit,
    loader: Iterable[tuple[Tensor, Tensor]],
) -> tuple[list[CurvePoint], list[float | None]]:
    """Early exit with one threshold for all exits, from one that lets all images leave at the first to one that lets
    nobody leave: points with threshold, top1 (per cent) and mean macs.

    And thresholds at which half of the images that reach an exit leave there.
    """
    logits, labels, images = collect_logits(early_exit.model, loader)
    answers = Answers.of(logits, labels, torch.arange(len(labels)), early_exit.temperatures, early_exit.policy)
    confidence, exits = answers.confidence, len(answers.confidence)
    as_threshold = partial(find_policy(early_exit.policy).to_threshold, classes=early_exit.model.num_classes)
    costs = early_exit.find_costs("macs", images)
    curve: list[CurvePoint] = []
    for threshold in [*confidence[0].quantile(torch.linspace(0, 1, POINTS, dtype=torch.double)).tolist(), None]:
        taken, macs = simulate(confidence, [threshold] * exits, costs)
        curve.append(
            {
                "threshold": as_threshold(threshold),
                "top1": 100 * float(answers.right.gather(0, taken[None]).double().mean()),
                "macs": float(macs.mean()),
            }
        )
    left, halving = torch.ones_like(labels, dtype=torch.bool), []
    for part in confidence:
        middle = float(part[left].median()) if left.any() else None
        halving.append(as_threshold(middle))
        if middle is not None:
            left &= part < middle
    return curve, halving
