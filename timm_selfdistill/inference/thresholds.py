"""Which thresholds are worth their cost: the curve of accuracy over cost that they can reach."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHTS = torch.logspace(-3, 1.5, 60).tolist()
"""Of the cost of an image, as a share of the plain network's, against its right answer."""
SWEEPS = 4
"""Times that every exit's threshold is chosen anew."""
STEPS = 8
"""Between two neighbouring points of the curve."""
EVERYBODY = float("-inf")
"""The threshold at which all images leave."""


@dataclass
class ExitCosts:
    """What an image costs, in any unit."""

    stages: list[float]
    """Of the network up to each of the C exits, without heads; the last is the plain network."""
    heads: list[float]
    """Of each shallow exit's head."""
    stops: list[int]
    """For each shallow exit, the exit at which an image that leaves there is out of the batch."""

    @property
    def plain(self) -> float:
        return self.stages[-1]

    def paths(self, used: list[bool]) -> Tensor:
        """Cost (C,) of an image that leaves at each exit, where the used exits' heads run."""
        run = torch.tensor([head * use for head, use in zip(self.heads, used)], dtype=torch.double).cumsum(0)
        run = torch.cat([run, run[-1:]])
        stages = torch.tensor(self.stages, dtype=torch.double)
        ends = torch.tensor([*self.stops, len(self.stages) - 1])
        return stages[ends] + run[ends]


class OperatingPoint(NamedTuple):
    thresholds: list[float | None]
    """Of the confidence at each shallow exit, None where nobody leaves and the head does not run."""
    accuracy: float
    """0 to 1."""
    cost: float
    """Mean of the images."""


def simulate(confidence: Tensor, thresholds: list[float | None], costs: ExitCosts) -> tuple[Tensor, Tensor]:
    """The exit (N,) that each image takes, and what it costs (N,).

    Args:
        confidence: (C - 1, N).
    """
    exits = torch.full(confidence.shape[1:], len(thresholds))
    for exit in reversed(range(len(thresholds))):
        threshold = thresholds[exit]
        if threshold is not None:
            exits[confidence[exit] >= threshold] = exit
    return exits, costs.paths([threshold is not None for threshold in thresholds])[exits]


def fixed_exits(right: Tensor, costs: ExitCosts) -> list[OperatingPoint]:
    """Each of the C exits for all images, shallow to deep; no other head runs.

    Args:
        right: (C, N) booleans.
    """
    points = []
    for exit, accuracy in enumerate(right.double().mean(1).tolist()):
        thresholds = [EVERYBODY if other == exit else None for other in range(len(right) - 1)]
        paths = costs.paths([threshold is not None for threshold in thresholds])
        points.append(OperatingPoint(thresholds, accuracy, float(paths[exit])))
    return points


def find_curve(confidence: Tensor, right: Tensor, costs: ExitCosts) -> list[OperatingPoint]:
    """Points that no other beats in both accuracy and cost, the cheapest first.

    For each weight of the cost the thresholds are chosen exit by exit, each the best one while the others stay, until
    nothing changes. Between two neighbours, at each exit the number of images that are confident enough goes from one's
    to the other's in equal steps. The fixed exits are among the candidates.

    Args:
        confidence: (C - 1, N).
        right: (C, N) booleans.
    """
    candidates = fixed_exits(right, costs)
    thresholds: list[float | None] = [None] * len(confidence)
    for weight in WEIGHTS:
        thresholds = _improve(thresholds, confidence, right, costs, weight / costs.plain)
        candidates.append(_measure(thresholds, confidence, right, costs))
    coarse = _undominated(candidates)
    between = [
        _measure(thresholds, confidence, right, costs)
        for first, second in pairwise(coarse)
        for thresholds in _interpolate(first.thresholds, second.thresholds, confidence)
    ]
    return _undominated(coarse + between)


def _measure(thresholds: list[float | None], confidence: Tensor, right: Tensor, costs: ExitCosts) -> OperatingPoint:
    exits, cost = simulate(confidence, thresholds, costs)
    accuracy = float(right.gather(0, exits[None]).double().mean())
    return OperatingPoint(thresholds, accuracy, float(cost.mean()))


def _undominated(points: list[OperatingPoint]) -> list[OperatingPoint]:
    best, accuracy = [], -1.0
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):
        if point.accuracy > accuracy:
            best.append(point)
            accuracy = point.accuracy
    return best


def _interpolate(first: list[float | None], second: list[float | None], confidence: Tensor) -> list[list[float | None]]:
    """Thresholds between two, by the numbers of images that they let leave."""
    ordered = confidence.sort(1, descending=True).values
    counts = [
        [0 if threshold is None else int((part >= threshold).sum()) for part, threshold in zip(ordered, side)]
        for side in (first, second)
    ]
    return [
        [_between(part, round(low + (high - low) * step / STEPS)) for part, low, high in zip(ordered, *counts)]
        for step in range(1, STEPS)
    ]


def _between(ordered: Tensor, count: int) -> float | None:
    """The threshold at which the `count` most confident images leave, the most confident first."""
    if count == 0:
        return None
    return EVERYBODY if count == len(ordered) else float((ordered[count - 1] + ordered[count]) / 2)


def _improve(
    thresholds: list[float | None],
    confidence: Tensor,
    right: Tensor,
    costs: ExitCosts,
    weight: float,
) -> list[float | None]:
    """Thresholds whose mean of (right answer - weight x cost) is no worse."""
    for _ in range(SWEEPS):
        before = thresholds
        for exit in range(len(confidence)):
            best = _best_threshold(exit, thresholds, confidence, right, costs, weight)
            thresholds = [*thresholds[:exit], best, *thresholds[exit + 1 :]]
        if thresholds == before:
            break
    return thresholds


def _best_threshold(
    exit: int,
    thresholds: list[float | None],
    confidence: Tensor,
    right: Tensor,
    costs: ExitCosts,
    weight: float,
) -> float | None:
    """Of one exit, while the others stay."""

    def values(used: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Whether images reach the exit, and their value if they go on and if they leave there."""
        others = [threshold if other != exit else None for other, threshold in enumerate(thresholds)]
        taken, _ = simulate(confidence, others, costs)
        paths = costs.paths(
            [used if other == exit else threshold is not None for other, threshold in enumerate(thresholds)]
        )
        go_on = right.gather(0, taken[None])[0].double() - weight * paths[taken]
        return taken > exit, go_on, right[exit].double() - weight * paths[exit]

    _, unused, _ = values(used=False)
    reaches, go_on, leave = values(used=True)
    if not reaches.any():
        return None
    ordered, order = confidence[exit][reaches].sort(descending=True)
    totals = go_on.sum() + (leave - go_on)[reaches][order].cumsum(0)
    totals[:-1][ordered[:-1] == ordered[1:]] = float("-inf")  # equally confident images leave together
    best = int(totals.argmax())
    if totals[best] <= unused.sum():
        return None
    return _between(ordered, best + 1)
