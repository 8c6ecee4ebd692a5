"""When an image may leave at an exit."""

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
from torch import Tensor


class Policy(NamedTuple):
    """A number for every image, and on which side of a threshold it may leave."""

    score: Callable[[Tensor], Tensor]
    """Of probabilities (B, K): numbers (B,)."""
    low_leaves: bool
    """An image leaves at or below the threshold, instead of at or above it."""
    highest: Callable[[int], float]
    """Highest score for K classes; the lowest is 0."""

    def leaves(self, probabilities: Tensor, threshold: float) -> Tensor:
        """Which images (B,) leave."""
        score = self.score(probabilities)
        return score <= threshold if self.low_leaves else score >= threshold


def _confidence(probabilities: Tensor) -> Tensor:
    return probabilities.amax(1)


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(1)


def _margin(probabilities: Tensor) -> Tensor:
    if probabilities.shape[1] == 1:
        return torch.ones_like(probabilities[:, 0])
    first, second = probabilities.topk(2, 1).values.unbind(1)
    return first - second


ROUNDING = 1e-5
"""Of float32, by which an entropy may be above the logarithm of the number of classes."""

POLICIES = {
    "confidence": Policy(_confidence, False, lambda classes: 1.0),
    "entropy": Policy(_entropy, True, lambda classes: log(classes) + ROUNDING),
    "margin": Policy(_margin, False, lambda classes: 1.0),
}
"""Highest probability; entropy of the probabilities in nats (BranchyNet, arXiv:1709.01686); the highest probability
less the second."""


def find_policy(name: str) -> Policy:
    """Raise ValueError for an unknown name."""
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]
