"""Temperatures and thresholds from data that the network has not seen in training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from math import log
from typing import Any

import torch
from torch import Tensor

from ..cost import measure_speedups
from ..model import SelfDistillModel
from .calibration_report import CalibrationReport, FixedExit
from .labelled import check_finite, labelled_batches
from .policy import find_policy
from .thresholds import ExitCosts, OperatingPoint, find_curve, fixed_exits, simulate

MIN_IMAGES = 300
"""Fewest images: a hundred for each of the three parts."""
BINS = 15
"""Of the expected calibration error (arXiv:1706.04599)."""
MARGIN = 2.0
"""Standard errors by which a promise must be kept on the images that thresholds are found on. There are two sources of
error, these images and those that check it."""
ROUNDING = 1e-9
"""Relative error of a mean in float64."""
CHANCE = 0.05
"""Probability of saying that some fixed exit is more accurate where all are equally good."""
BUDGETS = ("max_accuracy_drop", "max_macs", "min_speedup")


def collect_logits(
    model: SelfDistillModel, loader: Iterable[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits of all exits, C tensors (N, K), the labels (N,), and some of the images.

    Raises:
        ValueError: the loader gives no batches of images and labels, or labels out of range.
    """
    logits: list[list[Tensor]] = [[] for _ in model.exits]
    labels: list[Tensor] = []
    images: list[Tensor] = []
    with torch.no_grad():
        for x, y in labelled_batches(model, loader):
            for record, part in zip(logits, model.forward_exits(x, with_features=False).logits):
                record.append(part.float().cpu())
            labels.append(y.cpu())
            images = images or [x[:16]]
    found = [torch.cat(parts) for parts in logits]
    check_finite(found)
    return found, torch.cat(labels), images[0]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature by which logits (N, K) are divided that makes the labels (N,) likeliest (arXiv:1706.04599).

    The likelihood is concave in the inverse temperature, whose root of the derivative is found by bisection. It is kept
    between 1/4 and 4: where every answer is right, the likelihood alone would go to 0, and all confidences to 1.
    """
    logits, low, high = logits.double(), 0.25, 4.0
    right = logits.gather(1, labels[:, None])[:, 0]
    for _ in range(50):
        inverse = (low * high) ** 0.5
        slope = ((inverse * logits).softmax(1) * logits).sum(1).mean() - right.mean()
        low, high = (inverse, high) if slope < 0 else (low, inverse)
    return 1 / (low * high) ** 0.5


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error, 15 bins of equal width, 0 to 1."""
    confidence, answer = probabilities.max(1)
    right = (answer == labels).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add(0, bins, confidence.double() - right)
    return float(gaps.abs().sum() / len(labels))


class Calibration:
    """Outputs of all exits for some images, from which the thresholds for any budget follow: `EarlyExit.calibrate`.

    Args:
        loader: gives (images (B, C, H, W), class indices (B,)).
        find_costs: of "macs" or "time", the latter measured on some images.
        seed: of the split into three parts.
    """

    def __init__(
        self,
        model: SelfDistillModel,
        policy: str,
        loader: Iterable[tuple[Tensor, Tensor]],
        find_costs: Callable[[str, Tensor], ExitCosts],
        seed: int,
    ):
        self.logits, self.labels, images = collect_logits(model, loader)
        check_labels(self.labels)
        self.policy, self.classes = policy, model.num_classes
        self.parts = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed)).tensor_split(3)
        first = self.parts[0]
        self.temperatures = [fit_temperature(part[first], self.labels[first]) for part in self.logits]
        self.costs = cache(lambda unit: find_costs(unit, images))
        self.curve = cache(self._find_curve)

    def find(self, budget: dict[str, float]) -> CalibrationReport:
        """The thresholds for one of `BUDGETS`, see `check_budget`, and what they keep of it on the last part."""
        unit = "time" if "min_speedup" in budget else "macs"
        macs, costs = self.costs("macs"), self.costs(unit)
        point = choose_point(self.curve(unit), self._answers(1), costs, budget)
        check = self._answers(2)
        exits, macs_each = simulate(check.confidence, point.thresholds, macs)
        _, cost_each = simulate(check.confidence, point.thresholds, costs)
        accuracy = float(check.right.gather(0, exits[None]).double().mean())
        found = OperatingPoint(point.thresholds, accuracy, float(cost_each.mean()))
        better = find_better_exit(found, check, costs, budget)
        ece_before, ece_after = self._calibration_errors()
        return CalibrationReport(
            budget=budget,
            met=is_met(found, check.plain_accuracy, costs, budget),
            accuracy=100 * accuracy,
            plain_accuracy=100 * check.plain_accuracy,
            shares=[float((exits == exit).double().mean()) for exit in range(len(self.logits))],
            macs=float(macs_each.mean()),
            plain_macs=macs.plain,
            speedup=costs.plain / found.cost if unit == "time" else None,
            better_exit=None
            if better is None
            else FixedExit(
                exit=better,
                accuracy=100 * float(check.right[better].double().mean()),
                macs=fixed_exits(check.right, macs)[better].cost,
                speedup=costs.plain / fixed_exits(check.right, costs)[better].cost if unit == "time" else None,
            ),
            ece_before=ece_before,
            ece_after=ece_after,
            policy=self.policy,
            temperatures=self.temperatures,
            images=[len(part) for part in self.parts],
            thresholds=[find_policy(self.policy).to_threshold(value, self.classes) for value in point.thresholds],
        )

    def _find_curve(self, unit: str) -> list[OperatingPoint]:
        data = self._answers(1)
        return find_curve(data.confidence, data.right, self.costs(unit))

    def _answers(self, part: int) -> "Answers":
        return Answers.of(self.logits, self.labels, self.parts[part], self.temperatures, self.policy)

    def _calibration_errors(self) -> tuple[list[float], list[float]]:
        """Of every exit on the last part, without and with its temperature."""
        rows = self.parts[2]
        before, after = (
            [
                calibration_error((part[rows] / temperature).softmax(1), self.labels[rows])
                for part, temperature in zip(self.logits, temperatures)
            ]
            for temperatures in ([1.0] * len(self.logits), self.temperatures)
        )
        return before, after


@dataclass
class Answers:
    """Outputs of all exits for some images."""

    confidence: Tensor
    """(C - 1, N): images leave where it is at least the threshold."""
    right: Tensor
    """(C, N): whether the most likely class is the label."""

    @property
    def plain_accuracy(self) -> float:
        """Of the deepest exit, 0 to 1."""
        return float(self.right[-1].double().mean())

    @classmethod
    def of(
        cls,
        logits: list[Tensor],
        labels: Tensor,
        rows: Tensor,
        temperatures: list[float],
        policy: str,
    ) -> "Answers":
        measure = find_policy(policy).confidence
        confidence = torch.stack(
            [measure((part[rows] / temperature).softmax(1)) for part, temperature in zip(logits[:-1], temperatures)]
        )
        return cls(confidence.double(), torch.stack([part[rows].argmax(1) == labels[rows] for part in logits]))


def check_budget(budget: dict[str, float | None]) -> dict[str, float]:
    """The one budget that is a number.

    Raises:
        ValueError: there is none or more than one, or it can be none.
    """
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(BUDGETS)}, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    lowest = {"max_accuracy_drop": 0, "max_macs": 1, "min_speedup": 1}[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least {lowest}, got {value!r}")
    return {name: float(value)}


def check_labels(labels: Tensor) -> None:
    """Raise ValueError for too few images, or images of one class."""
    if len(labels) < MIN_IMAGES:
        raise ValueError(f"calibration needs at least {MIN_IMAGES} images, got {len(labels)}")
    if len(labels.unique()) < 2:
        raise ValueError(f"all {len(labels)} images are of class {int(labels[0])}; calibration needs two or more")


def choose_point(
    curve: list[OperatingPoint], data: Answers, costs: ExitCosts, budget: dict[str, float]
) -> OperatingPoint:
    """The cheapest point within an accuracy budget, or the most accurate within a cost budget; else the cheapest.

    Within means by `MARGIN` standard errors: a point that just keeps the promise here would break it on every second
    set of other images. The fixed exits are always among the points. All images cost the same there, so a cost budget
    that they keep here, they keep on any images, where a more accurate point of the curve may not. A point at most as
    expensive and at least as accurate as the cheapest within an accuracy budget is taken instead.
    """
    points = fixed_exits(data.right, costs) + curve
    within = [point for point in points if is_met(_pessimistic(point, data, costs), data.plain_accuracy, costs, budget)]
    if not within:
        return min(points, key=_cheapest)
    if "max_accuracy_drop" in budget:
        cheapest = min(within, key=_cheapest)
        within = [point for point in points if point.cost <= cheapest.cost and point.accuracy >= cheapest.accuracy]
    return max(within, key=lambda point: (point.accuracy, -point.cost))


def _cheapest(point: OperatingPoint) -> tuple[float, float]:
    return point.cost, -point.accuracy


def _pessimistic(point: OperatingPoint, data: Answers, costs: ExitCosts) -> OperatingPoint:
    """A point with the errors of its accuracy (less the plain network's) and of its cost against it."""
    exits, cost = simulate(data.confidence, point.thresholds, costs)
    gains = data.right.gather(0, exits[None])[0].double() - data.right[-1].double()
    return point._replace(accuracy=point.accuracy - _error(gains), cost=point.cost + _error(cost))


def _error(values: Tensor) -> float:
    """`MARGIN` standard errors of their mean."""
    return MARGIN * float(values.std()) / len(values) ** 0.5


def is_met(point: OperatingPoint, plain_accuracy: float, costs: ExitCosts, budget: dict[str, float]) -> bool:
    ((name, value),) = budget.items()
    if name == "max_accuracy_drop":
        return 100 * (plain_accuracy - point.accuracy) <= value + ROUNDING
    if name == "max_macs":
        return point.cost <= value * (1 + ROUNDING)
    return point.cost * value <= costs.plain * (1 + ROUNDING)


def find_better_exit(found: OperatingPoint, data: Answers, costs: ExitCosts, budget: dict[str, float]) -> int | None:
    """The best fixed exit that keeps the promise where what was found does not, or else is more accurate (within a cost
    budget) or cheaper (within an accuracy budget) by more than chance explains.

    Accuracies are compared by a sign test of the images that one of the two has right, costs by `MARGIN` standard
    errors.

    Args:
        found: measured on `data`, which had no part in finding it.
    """
    fixed = fixed_exits(data.right, costs)
    kept = [
        exit
        for exit, point in enumerate(fixed)
        if is_met(_pessimistic(point, data, costs), data.plain_accuracy, costs, budget)
    ]
    exits, cost = simulate(data.confidence, found.thresholds, costs)
    if not is_met(found, data.plain_accuracy, costs, budget):
        better = [exit for exit in kept if fixed[exit].cost < costs.plain]
    elif "max_accuracy_drop" in budget:
        better = [exit for exit in kept if fixed[exit].cost < found.cost - _error(cost)]
    else:
        right = data.right.gather(0, exits[None])[0]
        better = [exit for exit in kept if sign_test(data.right[exit], right) <= CHANCE / len(fixed)]
    if "max_accuracy_drop" in budget:
        return min(better, key=lambda exit: fixed[exit].cost, default=None)
    return max(better, key=lambda exit: fixed[exit].accuracy, default=None)


def sign_test(first: Tensor, second: Tensor) -> float:
    """Probability that `first` (N,) is right as much more often than `second` (N,) if both are equally good."""
    wins, losses = int((first & ~second).sum()), int((second & ~first).sum())
    count = torch.tensor(wins + losses, dtype=torch.double)
    more = torch.arange(wins, wins + losses + 1, dtype=torch.double)
    ways = torch.lgamma(count + 1) - torch.lgamma(more + 1) - torch.lgamma(count - more + 1)
    return float((ways - count * log(2)).exp().sum())


def macs_of_exits(model: SelfDistillModel, stops: list[int], input_size: tuple[int, int, int]) -> ExitCosts:
    """Multiply-adds of one image.

    Args:
        stops: for each shallow exit, where an image that leaves there leaves the batch.
    """
    rows = model.summary(input_size)[:-1]
    return ExitCosts([row.macs - row.head_macs for row in rows], [row.head_macs for row in rows[:-1]], stops)


def times_of_exits(model: SelfDistillModel, stops: list[int], x: Tensor) -> ExitCosts:
    """Measured times of images x (B, C, H, W), relative to the plain network's."""
    exits = range(len(model.stages))
    with torch.no_grad():
        maps = model.backbone.forward_intermediates(
            x, indices=[stage.index for stage in model.stages], intermediates_only=True
        )
    calls: list[Callable[[Tensor], Any]] = [partial(model.predict, exit=exit) for exit in exits]
    calls += [partial(_run_head, model, exit, maps[exit]) for exit in exits]
    times = [1 / speedup for speedup in measure_speedups(model, model.backbone, calls, x)]
    shallow, heads = times[: len(exits)], times[len(exits) :]
    return ExitCosts([*(max(0.0, time - head) for time, head in zip(shallow, heads)), 1.0], heads, stops)


def _run_head(model: SelfDistillModel, exit: int, feature_map: Tensor, _: Tensor) -> Any:
    return model.run_head(exit, feature_map)
