"""Means over seeds, and how far to trust them."""
from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t, ttest_1samp


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of two or more values, and half of its 95 % interval by Student's t."""
    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def p_value(differences: Sequence[float]) -> float:
    """Of the paired t-test, two-sided: how likely differences as large are where there is none."""
    return float(ttest_1samp(differences, 0).pvalue)
