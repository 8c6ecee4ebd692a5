"""Two calls, timed in turn."""
import statistics
import time
from collections.abc import Callable, Sequence


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, seconds: float) -> tuple[float, float, float]:
    """Median milliseconds of each of two calls, and the median of the ratios second / first, pair by pair.

    Two pairs warm up; then come at least `rounds` pairs and `seconds`.
    """
    times: list[list[float]] = [[], []]
    began = time.perf_counter()
    while len(times[0]) < rounds + 2 or time.perf_counter() - began < seconds:
        for call, record in zip(calls, times):
            start = time.perf_counter()
            call()
            record.append(1000 * (time.perf_counter() - start))
    times = [record[2:] for record in times]
    return *map(statistics.median, times), statistics.median(b / a for a, b in zip(*times))
