"""What every exit of a trained model costs and gives."""
from typing import Any

import torch
from torch import nn

from ..cost import count_cost, measure_speedups
from ..model import SelfDistillModel
from .metrics import ExitMetrics

CPU_MACS = 4_000_000_000
"""Multiply-adds that a timed call may take on a CPU, about a fifth of a second."""


def summarize(
        model: nn.Module, metrics: list[ExitMetrics], epochs: int, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """The content of summary.json: model, epochs, and per exit accuracy, loss, cost and measured speed-up.

    The speed-up is the time of the plain network over the exit's, on the model's device in eval mode.

    Args:
        input_size: (channels, height, width) of the images.
    """
    if isinstance(model, SelfDistillModel):
        costs = [(row.module, row.params, row.macs, row.share) for row in model.summary(input_size)]
        calls = [lambda x, exit=row.exit: model.predict(x, exit) for row in metrics]
        name = model.backbone.pretrained_cfg.get("architecture")
    else:
        params, macs, _ = count_cost(model, input_size)
        costs, calls = [("", params, macs, 1.0)], [model]
        name = getattr(model, "pretrained_cfg", {}).get("architecture")
    like = next(model.parameters())
    most_macs = costs[-1][2]
    count = 16 if like.is_cuda else max(1, min(16, CPU_MACS // most_macs))
    x = torch.randn(count, *input_size, device=like.device, dtype=like.dtype)
    plain = model.backbone if isinstance(model, SelfDistillModel) else model
    speedups = measure_speedups(model, plain, calls, x)
    return {
        "model": name or type(plain).__name__,
        "epochs": epochs,
        "input_size": list(input_size),
        "exits": [
            {**row._asdict(), "module": module, "params": params, "macs": macs, "share": share, "speedup": speedup}
            for row, (module, params, macs, share), speedup in zip(metrics, costs, speedups)
        ],
    }
