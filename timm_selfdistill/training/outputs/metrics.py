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
    """Percent."""
    top5: float
    """Percent."""
    loss: float
    """Mean cross entropy in nats."""

    @property
    def label(self) -> str:
        """Name in tables: "exit_0", or "ensemble"."""
        return self.exit if self.exit == "ensemble" else f"exit_{self.exit}"


def exit_logits(model: nn.Module, x: Any) -> tuple[Tensor, ...]:
    """Return the logits (B, K) of every exit; a plain model has only one.

    Args:
        x: images (B, in_chans, H, W), or for `ExitHeads` the features of a frozen backbone.
    """
    if isinstance(model, ExitHeads):
        return model(x).logits
    return model.forward_exits(x, with_features=False).logits if isinstance(model, SelfDistillModel) else (model(x),)


@torch.no_grad()
def count_logits(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Return the number of classes of a model without `num_classes`, found by running it on one image.

    Args:
        input_size: (channels, height, width).

    Raises:
        ValueError: the model does not return logits (B, K).
    """
    like = next(model.parameters())
    with evaluating(model):
        logits = model(torch.zeros(1, *input_size, dtype=like.dtype, device=like.device))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(model).__name__} must return logits (B, classes) for images (B, channels, H, W), got {given} for"
            " one image"
        )
    return logits.shape[1]


class ExitMeter:
    """Accumulates loss and hits of every exit, and of the ensemble if there are several, without a GPU sync."""

    def __init__(self, classifiers: int, device: torch.device):
        rows = classifiers + 1 if classifiers > 1 else 1
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.totals = torch.zeros(rows, 4, device=device, dtype=dtype)

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor], target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, K) for every exit, from the first to the deepest.
            target: class indices (B,).
        """
        if len(logits) > 1:
            logits = [*logits, torch.stack(list(logits)).mean(0)]
        self.totals += torch.stack([_count(z.float(), target) for z in logits])

    def compute(self, totals: Tensor) -> list[ExitMetrics]:
        """Compute the metrics.

        Args:
            totals: `self.totals`, summed over all processes.

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
    """Measure every exit and the ensemble over the batches of all processes, in full precision, so that anyone who
    evaluates the saved model gets the same result.

    Args:
        labelled: if False, the prediction of the deepest exit counts as the label.

    Returns:
        The metrics, and the number of images they were measured on.
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
    """Return the metrics of an epoch as columns of history.csv."""
    return {f"{name}_{metric.label}": getattr(metric, name) for metric in metrics for name in ("top1", "top5", "loss")}


def of_columns(row: HistoryRow) -> list[ExitMetrics]:
    """Return the metrics in a row of history.csv; empty if the epoch was not validated."""
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
    """Return the metric that selects the best model: that of the deepest exit, or the average over the other exits if
    the backbone is frozen.

    Args:
        name: "top1", "top5" or "loss".
    """
    *others, deepest = [getattr(metric, name) for metric in metrics if metric.exit != "ensemble"]
    return sum(others) / len(others) if frozen else deepest


def _count(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sums of loss, top-1 hits, top-5 hits and images."""
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    loss = F.cross_entropy(logits, target, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum().to(loss), hits.sum().to(loss), torch.full_like(loss, len(target))])


CPU_MACS = 2_000_000_000
"""Maximum multiply-adds of a timed call on a CPU, about a tenth of a second."""
TIMED_SECONDS = 2.0
"""Time after which no new round of timed calls starts, once there were `ROUNDS`."""
ROUNDS = 7
"""Minimum number of rounds of timed calls."""
NOISE = 0.05
"""Maximum relative standard error of a speed-up; anything noisier is not recorded."""


def exit_costs(model: nn.Module, input_size: tuple[int, int, int]) -> list[ExitRow]:
    """Return exit, module, parameters, multiply-adds and their share of the plain network, one row per exit. A plain
    model has one row.

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
    """Return a row per exit with its accuracy and its cost."""
    return [
        {"exit": metric.exit, "top1": metric.top1, "top5": metric.top5, "loss": metric.loss, **cost}
        for metric, cost in zip(metrics, costs, strict=True)
    ]


def with_speedups(model: nn.Module, rows: list[ExitRow], input_size: tuple[int, int, int]) -> list[ExitRow]:
    """Return the rows with "speedup": the time of the plain network divided by that of the exit, measured on the
    model's device in eval mode. It is 1 for the plain network, and left out where the measurement is too noisy."""
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
    """Measure the time of the plain network divided by that of each call, on images x (B, C, H, W); None where the
    measurement is too noisy."""
    ratios = time_ratios(model, model.backbone, calls, x, seconds=TIMED_SECONDS, at_least=ROUNDS)
    return [None if is_noise(found) else median(found) for found in ratios]


def is_noise(ratios: list[float]) -> bool:
    """Whether the relative standard error of the median, estimated from the quartiles of a normal distribution, is
    above `NOISE`."""
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5 > NOISE * middle


def model_name(model: nn.Module) -> str:
    backbone = model.backbone if isinstance(model, SelfDistillModel) else model
    return getattr(backbone, "pretrained_cfg", {}).get("architecture") or type(backbone).__name__
