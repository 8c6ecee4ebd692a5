"""What every exit of a trained model costs and gives."""
from typing import Any

import torch
from torch import nn

from ..cost import count_cost, measure_speedups
from ..model import SelfDistillModel
from .metrics import ExitMetrics

CPU_MACS = 4_000_000_000
"""Multiply-adds that a timed call may take on a CPU, about a fifth of a second."""
TIMED_SECONDS = 2.0
"""After which no further round of timed calls begins."""


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


def exit_speedups(model: nn.Module, rows: list[dict[str, Any]], input_size: tuple[int, int, int]) -> list[float]:
    """Measured time of the plain network over that of each row's exit, on the model's device in eval mode."""
    like = next(model.parameters())
    count = 16 if like.is_cuda else max(1, min(16, CPU_MACS // rows[-1]["macs"]))
    x = torch.randn(count, *input_size, device=like.device, dtype=like.dtype)
    if isinstance(model, SelfDistillModel):
        calls = [lambda x, exit=row["exit"]: model.predict(x, exit) for row in rows]
        return measure_speedups(model, model.backbone, calls, x, seconds=TIMED_SECONDS)
    return measure_speedups(model, model, [model], x, seconds=TIMED_SECONDS)


def model_name(model: nn.Module) -> str:
    backbone = model.backbone if isinstance(model, SelfDistillModel) else model
    return getattr(backbone, "pretrained_cfg", {}).get("architecture") or type(backbone).__name__
