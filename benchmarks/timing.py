"""Calls, timed in turn."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, seconds: float, warm_up: int = 2
) -> list[list[float]]:
    """Milliseconds of each call in every round, in which all run one after the other.

    After `warm_up` rounds come at least `rounds` rounds and `seconds`.
    """
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    while len(times[0]) < rounds + warm_up or time.perf_counter() - began < seconds:
        for call, record in zip(calls, times):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            record.append(1000 * (time.perf_counter() - start))
    return [record[warm_up:] for record in times]


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios times / others, round by round."""
    return statistics.median(time / other for time, other in zip(times, others))
