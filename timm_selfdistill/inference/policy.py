"""When an image may leave at an exit: policies, and their thresholds and temperatures."""

from collections.abc import Callable, Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import SelfDistillModel


class Policy(NamedTuple):
    """How confidence is measured, and how a threshold states it."""

    confidence: Callable[[Tensor], Tensor]
    """Of probabilities (B, K): numbers (B,), the higher the more confident."""
    sign: int
    """A threshold is the confidence times this: -1 where users state the opposite, an entropy."""
    highest: Callable[[int], float]
    """Highest threshold for K classes; the lowest is 0."""

    def leaves(self, probabilities: Tensor, threshold: float) -> Tensor:
        """Which images (B,) leave."""
        return self.confidence(probabilities) >= self.sign * threshold

    def to_threshold(self, confidence: float | None, classes: int) -> float | None:
        """The threshold that images of at least this confidence leave at, -inf being all; None where none does."""
        if confidence is None:
            return None
        return max(confidence, 0.0) if self.sign > 0 else min(-confidence, self.highest(classes))


def _highest_probability(probabilities: Tensor) -> Tensor:
    return probabilities.amax(1)


def _negative_entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.entr(probabilities).sum(1)


def _margin(probabilities: Tensor) -> Tensor:
    if probabilities.shape[1] == 1:
        return torch.ones_like(probabilities[:, 0])
    first, second = probabilities.topk(2, 1).values.unbind(1)
    return first - second


ROUNDING = 1e-5
"""Of float32, by which an entropy may be above the logarithm of the number of classes."""

POLICIES = {
    "confidence": Policy(_highest_probability, 1, lambda classes: 1.0),
    "entropy": Policy(_negative_entropy, -1, lambda classes: log(classes) + ROUNDING),
    "margin": Policy(_margin, 1, lambda classes: 1.0),
}
"""Highest probability; entropy of the probabilities in nats (BranchyNet, arXiv:1709.01686); the highest probability
less the second."""


def find_policy(name: str) -> Policy:
    """Raise ValueError for an unknown name."""
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]


def check_thresholds(
    thresholds: Sequence[float | None] | float, policy: str, model: SelfDistillModel
) -> list[float | None]:
    """One threshold for each shallow exit.

    Raises:
        ValueError: there are too few or too many, or one is no number in the policy's range.
    """
    exits, highest = len(model.stages), find_policy(policy).highest(model.num_classes)
    thresholds = thresholds.tolist() if hasattr(thresholds, "tolist") else thresholds
    if isinstance(thresholds, (int, float)) and not isinstance(thresholds, bool):
        thresholds = [thresholds] * exits
    if isinstance(thresholds, (str, bytes)) or not isinstance(thresholds, Sequence) or len(thresholds) != exits:
        raise ValueError(f"expected {exits} thresholds, one for each shallow exit, got {thresholds!r}")
    for threshold in thresholds:
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if threshold is not None and not (number and 0 <= threshold <= highest):
            raise ValueError(
                f"a threshold of the policy {policy!r} is a number from 0 to {highest:.4g}, or None for an exit that"
                f" nobody takes, got {threshold!r}"
            )
    return list(thresholds)


def check_temperatures(temperatures: Sequence[float] | None, model: SelfDistillModel) -> list[float]:
    """One temperature for each exit; 1 where None is given.

    Raises:
        ValueError: there are too few or too many, or one is no number above 0.
    """
    exits = len(model.exits)
    if temperatures is None:
        return [1.0] * exits
    if isinstance(temperatures, (str, bytes)) or not isinstance(temperatures, Sequence) or len(temperatures) != exits:
        raise ValueError(f"expected {exits} temperatures, one for each exit, got {temperatures!r}")
    for value in temperatures:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"a temperature is a number above 0, got {value!r}")
    return list(temperatures)
