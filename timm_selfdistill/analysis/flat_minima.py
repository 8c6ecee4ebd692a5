"""Flat minima: how fast accuracy falls where the weights are shaken ("Be Your Own Teacher", arXiv:1905.08094, 4.4)."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from ..cost import evaluating
from ..inference.labelled import all_finite, check_finite, labelled_batches
from ..model import SelfDistillModel
from ..pictures import SERIES, create_figure, finish
from ..training.outputs.metrics import ExitMeter, ExitMetrics, exit_logits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALED_LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3)
"""Of a tensor's root mean square."""
UNSCALED_LEVELS = (0.005, 0.01, 0.02, 0.03, 0.04)
"""Standard deviations, the same for every weight."""

STYLES: tuple[Literal[":", "-.", "--"], ...] = (":", "-.", "--")
"""Lines of shallow exits."""

T = TypeVar("T")


class NoiseRow(TypedDict):
    """An exit under noise of one level: mean, standard deviation (None of a single draw), smallest and largest over
    the draws of top-1 (per cent) and cross entropy (nats)."""

    level: float
    exit: int | str
    top1: float
    top1_std: float | None
    top1_min: float
    top1_max: float
    loss: float
    loss_std: float | None
    loss_min: float
    loss_max: float


@dataclass
class FlatMinimaReport:
    """Accuracy and loss of every exit under noise on the weights. Level 0 is the model as it is, in one draw.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_flatness
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> report = measure_flatness(model, loader, levels=[0.1], draws=1)
        >>> [row["level"] for row in report.of_exit(-1)]
        [0, 0.1]
    """

    levels: list[float]
    """Ascending, the first is 0."""
    scaled: bool
    """Whether a level is a share of each tensor's root mean square; else it is the noise's standard deviation."""
    draws: int
    seed: int
    images: int
    metrics: list[list[list[ExitMetrics]]]
    """Per level, draw and exit."""

    @property
    def deepest(self) -> int:
        """Number of the deepest exit."""
        return max(metrics.exit for metrics in self.metrics[0][0] if isinstance(metrics.exit, int))

    def rows(self) -> list[NoiseRow]:
        """A row per level and exit."""
        rows: list[NoiseRow] = []
        for level, draws in zip(self.levels, self.metrics):
            for of_exit in zip(*draws):
                top1, loss = [metrics.top1 for metrics in of_exit], [metrics.loss for metrics in of_exit]
                rows.append(
                    {
                        "level": level,
                        "exit": of_exit[0].exit,
                        "top1": mean(top1),
                        "top1_std": _stdev(top1),
                        "top1_min": min(top1),
                        "top1_max": max(top1),
                        "loss": mean(loss),
                        "loss_std": _stdev(loss),
                        "loss_min": min(loss),
                        "loss_max": max(loss),
                    }
                )
        return rows

    def of_exit(self, exit: int | str = -1) -> list[NoiseRow]:
        """The rows of one exit, by level; -1 is the deepest."""
        exit = self.deepest if exit == -1 else exit
        return [row for row in self.rows() if row["exit"] == exit]

    def to_dict(self) -> dict[str, Any]:
        every = [[[metrics._asdict() for metrics in exits] for exits in draws] for draws in self.metrics]
        return asdict(self) | {"metrics": every, "rows": self.rows()}

    def __rich__(self) -> Table:
        unit = "scaled by each tensor" if self.scaled else "the same on every weight"
        table = Table(title=f"noise {unit}; draws: {self.draws}, images: {self.images}", title_justify="left")
        for name in ("noise", "exit", "top-1 %", "loss"):
            table.add_column(name, justify="left" if name == "exit" else "right")
        exits = len(self.metrics[0][0])
        for number, row in enumerate(self.rows(), 1):
            table.add_row(
                f"{row['level']:g}",
                str(row["exit"]),
                _with_spread(row["top1"], row["top1_std"], 2),
                _with_spread(row["loss"], row["loss_std"], 3),
                end_section=exits > 1 and number % exits == 0,
            )
        return table


def measure_flatness(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    levels: Sequence[float] | None = None,
    draws: int = 5,
    scaled: bool = True,
    seed: int = 0,
) -> FlatMinimaReport:
    """Accuracy and loss of every exit with Gaussian noise of growing size on all weights, in eval mode.

    The model that stays accurate under more noise lies in a flatter minimum. Networks of one architecture get the same
    draws, the backbone of a self-distilled model those of the plain network. The loader is read once, and then once for
    each draw of each level.

    Args:
        model: a self-distilled or a plain timm model; is as it was afterwards, to the last bit.
        loader: gives (images (B, C, H, W), class indices (B,)), every time it is iterated.
        levels: sizes of the noise, > 0; None is `SCALED_LEVELS` or `UNSCALED_LEVELS`.
        draws: of noise, for each level.
        scaled: see `sweep_noise`.
        seed: of the noise.

    Raises:
        ValueError: an argument is out of range, the loader gives no images, labels are missing or out of range, or
            logits are no finite numbers.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_flatness
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> report = measure_flatness(model, loader, levels=[0.1, 0.2], draws=2)
        >>> report.levels, report.draws, report.images
        ([0, 0.1, 0.2], 2, 32)
    """
    if isinstance(loader, Iterator):
        raise ValueError("the loader can be read only once; pass one that starts anew each time, e.g. a DataLoader")
    levels = (SCALED_LEVELS if scaled else UNSCALED_LEVELS) if levels is None else levels
    _check_noise(levels, draws)
    classifiers = len(model.exits) if isinstance(model, SelfDistillModel) else 1
    device = next(model.parameters()).device
    meter = ExitMeter(classifiers, device)

    def measure(level: float) -> list[ExitMetrics]:
        meter.totals.zero_()
        for x, y in labelled_batches(model, loader):
            logits = exit_logits(model, x)
            _check_noisy(logits, level)
            meter.update(logits, y.to(device))
        return meter.compute(meter.totals)

    with evaluating(model), torch.no_grad():
        untouched = measure(0)
        images = int(meter.totals[0, 3])
        found = sweep_noise(model, measure, levels, draws, scaled, seed)
    return FlatMinimaReport(
        [0, *sorted(levels)], scaled, draws, seed, images, [[untouched], *(found[level] for level in sorted(levels))]
    )


def sweep_noise(
    model: nn.Module,
    measure: Callable[[float], T],
    levels: Sequence[float],
    draws: int = 5,
    scaled: bool = True,
    seed: int = 0,
) -> dict[float, list[T]]:
    """Measure a model with Gaussian noise on its parameters; buffers, such as batch norm's statistics, stay.

    A draw is one direction in which the weights go further with each level.

    Args:
        measure: is called with the level while the model has that noise.
        levels: sizes of the noise, > 0.
        scaled: a level is the noise's standard deviation over the root mean square of the tensor; tensors of zeros get
            none. False: it is the standard deviation itself.

    Returns:
        For each level what `measure` gave for each draw.

    Raises:
        ValueError: a level or the number of draws is out of range.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.analysis import sweep_noise
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> def measure(level):
        ...     with torch.no_grad():
        ...         return float(model(loader[0][0]).std())
        >>> found = sweep_noise(model, measure, levels=[0.1, 0.2], draws=3)
        >>> {level: len(values) for level, values in found.items()}
        {0.1: 3, 0.2: 3}
    """
    _check_noise(levels, draws)
    found: dict[float, list[T]] = {level: [] for level in levels}
    for draw in range(draws):
        noise = draw_noise(model, draw, scaled, seed)
        for level in levels:
            with shaken(noise, level):
                found[level].append(measure(level))
    return found


def draw_noise(model: nn.Module, draw: int, scaled: bool = True, seed: int = 0) -> dict[nn.Parameter, Tensor]:
    """Gaussian noise for every parameter, of standard deviation 1, or scaled by the tensor's root mean square.

    It depends on seed, draw, and the tensor's name and shape, not on the rest of the model or on its device.
    """
    noise = {}
    for name, parameter in model.named_parameters():
        if isinstance(model, SelfDistillModel):
            name = name.removeprefix("backbone.")
        digest = hashlib.sha256(f"{seed}/{draw}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        unit = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        size = parameter.detach().float().square().mean().sqrt() if scaled and parameter.numel() else 1.0
        noise[parameter] = torch.empty_like(parameter).copy_(unit * size).detach()
    return noise


@contextmanager
def shaken(noise: Mapping[nn.Parameter, Tensor], level: float) -> Iterator[None]:
    """Parameters with `level` times their noise; afterwards they hold the very tensors that they held before."""
    weights = {parameter: parameter.data for parameter in noise}
    try:
        for parameter, tensor in noise.items():
            parameter.data = weights[parameter] + level * tensor
        yield
    finally:
        for parameter, tensor in weights.items():
            parameter.data = tensor


def plot_flatness(path: str | Path, reports: Mapping[str, FlatMinimaReport]) -> None:
    """Draw accuracy and loss of the deepest exit over the noise, a colour a model: the mean over the draws, and a band
    from the smallest to the largest; its other exits faintly.

    Args:
        reports: by the model's name, all of the same kind of noise.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_flatness, plot_flatness
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> report = measure_flatness(model, loader, levels=[0.1], draws=1)
        >>> plot_flatness("flat_minima.png", {"self-distilled": report})
    """
    from matplotlib.lines import Line2D

    figure = create_figure(8, 4.2)
    figure.set_layout_engine("constrained")
    accuracy, loss = figure.subplots(1, 2)
    panels: dict[Literal["top1", "loss"], Axes] = {"top1": accuracy, "loss": loss}
    for index, (name, report) in enumerate(reports.items()):
        color, deepest = SERIES[index % len(SERIES)], report.of_exit()
        for key, axes in panels.items():
            _draw_band(axes, deepest, key, color=color, label=f"{name}, deepest exit")
            for exit in range(report.deepest):
                axes.plot(
                    report.levels,
                    [row[key] for row in report.of_exit(exit)],
                    color=color,
                    alpha=0.6,
                    linestyle=STYLES[exit % len(STYLES)],
                )
    scaled = next(iter(reports.values())).scaled
    for axes in panels.values():
        finish(axes, xlabel="noise / RMS of each tensor" if scaled else "standard deviation of the noise")
    panels["top1"].set(ylabel="top-1 %", title="accuracy under noise on the weights")
    shallow = max(report.deepest for report in reports.values())
    handles, _ = panels["top1"].get_legend_handles_labels()
    others = [
        Line2D([], [], color="gray", linestyle=STYLES[exit % len(STYLES)], label=f"exit {exit}")
        for exit in range(shallow)
    ]
    panels["top1"].legend(handles=[*handles, *others], loc="lower left", fontsize=9)
    panels["loss"].set(ylabel="cross entropy, nats", yscale="log", title="loss under noise on the weights")
    for which in (panels["loss"].yaxis.set_major_formatter, panels["loss"].yaxis.set_minor_formatter):
        which("{x:g}")
    figure.savefig(path, dpi=120)


def _draw_band(axes: "Axes", rows: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    levels, means, low, high = ([row[name] for row in rows] for name in ("level", key, f"{key}_min", f"{key}_max"))
    axes.plot(levels, means, marker=".", **style)
    axes.fill_between(levels, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _check_noise(levels: Sequence[float], draws: int) -> None:
    if not levels or not all(_is_number(level) and level > 0 for level in levels) or len(set(levels)) < len(levels):
        raise ValueError(f"levels must be different numbers above 0, got {list(levels)}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be a whole number of at least 1, got {draws!r}")


def _check_noisy(logits: Sequence[Tensor], level: float) -> None:
    if level == 0:
        check_finite(logits)
    elif not all_finite(logits):
        raise ValueError(f"with noise of level {level:g} the logits are no finite numbers; choose lower levels")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _with_spread(value: float, spread: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _stdev(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
