"""Means over seeds, and how far to trust them."""
from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of two or more values, and half of its 95 % interval by Student's t."""
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
