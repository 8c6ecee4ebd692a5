"""Accuracy and cost of every exit."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ...cost import count_cost, evaluating, time_ratios
from ...hub import ExitRow
from ...model import SelfDistillModel
from ...task import ExitHeads
from ..state.snapshot import HistoryRow


class ExitMetrics(NamedTuple):
    exit: int | str
    """0..C-1, or "ensemble"; plain models have exit 0 only."""
    top1: float
    """Per cent."""
    top5: float
    """Per cent."""
    loss: float
    """Mean cross entropy, nats."""

    @property
    def label(self) -> str:
        """In tables: "exit_0", or "ensemble"."""
        return self.exit if self.exit == "ensemble" else f"exit_{self.exit}"


def exit_logits(model: nn.Module, x: Any) -> tuple[Tensor, ...]:
    """Logits (B, K) of every classifier of a self-distilled model, or of the only one of another.

    Args:
        x: images (B, in_chans, H, W); of `ExitHeads`, the features of a frozen backbone.
    """
    if isinstance(model, ExitHeads):
        return model(x).logits
    return model.forward_exits(x, with_features=False).logits if isinstance(model, SelfDistillModel) else (model(x),)


@torch.no_grad()
def count_logits(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Classes of a model that does not tell them: it is shown an image.

    Args:
        input_size: (channels, height, width).

    Raises:
        ValueError: it gives no logits (B, K).
    """
    like = next(model.parameters())
    with evaluating(model):
        logits = model(torch.zeros(1, *input_size, dtype=like.dtype, device=like.device))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(model).__name__} must give logits (B, classes) for images (B, channels, H, W), got {given} for one"
        )
    return logits.shape[1]


class ExitMeter:
    """Adds up loss and hits of every exit, and of their ensemble where there are several, without waiting for a GPU."""

    def __init__(self, classifiers: int, device: torch.device):
        rows = classifiers + 1 if classifiers > 1 else 1
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.totals = torch.zeros(rows, 4, device=device, dtype=dtype)

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor], target: Tensor) -> None:
        """Count a batch.

        Args:
            logits: of every exit, (B, K), shallow to deep.
            target: class indices (B,).
        """
        if len(logits) > 1:
            logits = [*logits, torch.stack(list(logits)).mean(0)]
        self.totals += torch.stack([_count(z.float(), target) for z in logits])

    def compute(self, totals: Tensor) -> list[ExitMetrics]:
        """Metrics from `totals`, summed over all processes.

        Raises:
            ValueError: there was no image.
        """
        if not totals[0, 3]:
            raise ValueError("there are no validation images that can be read")
        names: list[int | str] = list(range(len(totals)))
        if len(names) > 1:
            names[-1] = "ensemble"
        return [
            ExitMetrics(name, 100 * top1 / count, 100 * top5 / count, loss / count)
            for name, (loss, top1, top5, count) in zip(names, totals.tolist())
        ]


def measure_exits(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    accelerator: Accelerator,
    labelled: bool = True,
) -> tuple[list[ExitMetrics], int]:
    """Accuracy of every exit and of the ensemble over the batches of all processes, and how many images they have; in
    full precision, as every reader of the saved model measures it.

    Args:
        labelled: False counts as right what the deepest classifier says.
    """
    classifiers = len(model.heads) + 1 if isinstance(model, (SelfDistillModel, ExitHeads)) else 1
    meter = ExitMeter(classifiers, accelerator.device)
    with evaluating(model), torch.no_grad(), torch.autocast(accelerator.device.type, enabled=False):
        for x, y in batches:
            logits = exit_logits(model, x)
            meter.update(logits, y if labelled else logits[-1].argmax(1))
    totals = accelerator.reduce(meter.totals, "sum")
    return meter.compute(totals), int(totals[0, 3])


def as_columns(metrics: list[ExitMetrics]) -> dict[str, float]:
    """Metrics of an epoch as history.csv has them."""
    return {f"{name}_{metric.label}": getattr(metric, name) for metric in metrics for name in ("top1", "top5", "loss")}


def of_columns(row: HistoryRow) -> list[ExitMetrics]:
    """The metrics in a row of history.csv; empty where the epoch was not measured."""
    labels = [key.removeprefix("top1_") for key in row if key.startswith("top1_")]
    return [
        ExitMetrics(
            label if label == "ensemble" else int(label.removeprefix("exit_")),
            row[f"top1_{label}"],
            row[f"top5_{label}"],
            row[f"loss_{label}"],
        )
        for label in labels
    ]


def deciding_metric(metrics: list[ExitMetrics], frozen: bool, name: str = "top1") -> float:
    """By which one model is better than another: that of the deepest exit, or where it is frozen the mean of the
    others.

    Args:
        name: "top1", "top5" or "loss".
    """
    *shallow, deepest = [getattr(metric, name) for metric in metrics if metric.exit != "ensemble"]
    return sum(shallow) / len(shallow) if frozen else deepest


def _count(logits: Tensor, target: Tensor) -> Tensor:
    """Summed loss, top-1 hits, top-5 hits, images."""
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    loss = F.cross_entropy(logits, target, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum().to(loss), hits.sum().to(loss), torch.full_like(loss, len(target))])


CPU_MACS = 2_000_000_000
"""Multiply-adds that a timed call may take on a CPU, about a tenth of a second."""
TIMED_SECONDS = 2.0
"""After which no further round of timed calls begins, once there are `ROUNDS`."""
ROUNDS = 7
"""Fewest rounds of timed calls."""
NOISE = 0.05
"""Highest standard error of a speed-up, as a share of it; one with a higher is noise and not written down."""


def exit_costs(model: nn.Module, input_size: tuple[int, int, int]) -> list[ExitRow]:
    """Exit, module, parameters, multiply-adds and share of the plain network's, for each exit or a plain model alone.

    Args:
        input_size: (channels, height, width) of the images.
    """
    if isinstance(model, SelfDistillModel):
        return [
            {"exit": row.exit, "module": row.module, "params": row.params, "macs": row.macs, "share": row.share}
            for row in model.summary(input_size)
        ]
    params, macs, _ = count_cost(model, input_size)
    return [{"exit": 0, "module": "", "params": params, "macs": macs, "share": 1.0}]


def merge_rows(metrics: list[ExitMetrics], costs: list[ExitRow]) -> list[ExitRow]:
    """A row per exit: its accuracy and its cost."""
    return [
        {"exit": metric.exit, "top1": metric.top1, "top5": metric.top5, "loss": metric.loss, **cost}
        for metric, cost in zip(metrics, costs, strict=True)
    ]


def with_speedups(model: nn.Module, rows: list[ExitRow], input_size: tuple[int, int, int]) -> list[ExitRow]:
    """The rows with "speedup", the measured time of the plain network over that of the row's exit, on the model's
    device in eval mode: 1 for the plain network itself; left out where the measurement is noise."""
    if not isinstance(model, SelfDistillModel):
        return [row | {"speedup": 1.0} for row in rows]
    plain = len(model.exits) - 1
    others = [row for row in rows if row["exit"] != plain]
    like = next(model.parameters())
    count = 16 if like.is_cuda else max(1, min(16, int(CPU_MACS // rows[-1]["macs"])))
    x = torch.randn(count, *input_size, device=like.device, dtype=like.dtype)
    calls: list[Callable[[Tensor], Any]] = [partial(model.predict, exit=row["exit"]) for row in others]
    speedups = {plain: 1.0} | dict(zip((row["exit"] for row in others), find_speedups(model, calls, x)))
    return [row if (found := speedups[row["exit"]]) is None else row | {"speedup": found} for row in rows]


def find_speedups(model: SelfDistillModel, calls: list[Callable[[Tensor], Any]], x: Tensor) -> list[float | None]:
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
