"""What every exit of a trained model costs and gives."""
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from ..cost import count_cost, time_ratios
from ..model import SelfDistillModel
from .metrics import ExitMetrics

CPU_MACS = 2_000_000_000
"""Multiply-adds that a timed call may take on a CPU, about a tenth of a second."""
TIMED_SECONDS = 2.0
"""After which no further round of timed calls begins, once there are `ROUNDS`."""
ROUNDS = 7
"""Fewest rounds of timed calls."""
NOISE = 0.05
"""Highest standard error of a speed-up, as a share of it; one with a higher is noise and not written down."""


def exit_costs(model: nn.Module, input_size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Exit, module, parameters, multiply-adds and share of the plain network's, for each exit or a plain model alone.

    Args:
        input_size: (channels, height, width) of the images.
    """
    if isinstance(model, SelfDistillModel):
        return [{"exit": row.exit, "module": row.module, "params": row.params, "macs": row.macs, "share": row.share}
                for row in model.summary(input_size)]
    params, macs, _ = count_cost(model, input_size)
    return [{"exit": 0, "module": "", "params": params, "macs": macs, "share": 1.0}]


def merge_rows(metrics: list[ExitMetrics], costs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per exit: its accuracy and its cost."""
    return [metric._asdict() | cost for metric, cost in zip(metrics, costs, strict=True)]


def with_speedups(
        model: nn.Module, rows: list[dict[str, Any]], input_size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """The rows with "speedup", the measured time of the plain network over that of the row's exit, on the model's
    device in eval mode: 1 for the plain network itself; left out where the measurement is noise."""
    if not isinstance(model, SelfDistillModel):
        return [row | {"speedup": 1.0} for row in rows]
    plain = len(model.exits) - 1
    others = [row for row in rows if row["exit"] != plain]
    like = next(model.parameters())
    count = 16 if like.is_cuda else max(1, min(16, CPU_MACS // rows[-1]["macs"]))
    x = torch.randn(count, *input_size, device=like.device, dtype=like.dtype)
    calls = [lambda x, exit=row["exit"]: model.predict(x, exit) for row in others]
    speedups = {plain: 1.0} | dict(zip((row["exit"] for row in others), find_speedups(model, calls, x)))
    return [row | ({} if speedups[row["exit"]] is None else {"speedup": speedups[row["exit"]]}) for row in rows]


def find_speedups(
        model: SelfDistillModel, calls: list[Callable[[torch.Tensor], Any]], x: torch.Tensor) -> list[float | None]:
    """The measured time of the plain network over that of each call, for images x (B, C, H, W); None where the
    measurement is noise."""
    ratios = time_ratios(model, model.backbone, calls, x, seconds=TIMED_SECONDS, at_least=ROUNDS)
    return [None if is_noise(found) else median(found) for found in ratios]


def is_noise(ratios: list[float]) -> bool:
    """Whether the median of several measurements says little: its standard error, from their quartiles as of a normal
    distribution, is above `NOISE`."""
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5 > NOISE * middle


def model_name(model: nn.Module) -> str:
    backbone = model.backbone if isinstance(model, SelfDistillModel) else model
    return getattr(backbone, "pretrained_cfg", {}).get("architecture") or type(backbone).__name__
