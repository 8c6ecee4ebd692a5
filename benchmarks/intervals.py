"""Means over seeds, and how far to trust them."""

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t, ttest_1samp


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of two or more values, and half of its 95 % interval by Student's t."""
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def format_mean(values: Sequence[float], sign: str = "") -> str:
    """With half of the interval, where there are two or more."""
    if len(values) < 2:
        return f"{values[0]:{sign}.2f}"
    center, half = mean_interval(values)
    return f"{center:{sign}.2f} ± {half:.2f}"


def p_value(differences: Sequence[float]) -> float:
    """Of the paired t-test, two-sided: how likely differences as large are where there is none."""
    return float(ttest_1samp(differences, 0).pvalue)
