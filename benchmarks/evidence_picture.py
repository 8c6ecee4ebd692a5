"""When does it help? The gain over the plain network against images per class, with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evidence_data import DATA
from evidence_grid import SETTINGS
from evidence_points import differences
from intervals import mean_interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLORS = {"dsn": "tab:gray", "paper": "tab:orange", "deepest": "tab:red", "ensemble": "tab:blue", "dks": "tab:green"}
MARKERS = {"resnet10-8": "v", "resnet10-16": "o", "resnet18-16": "s", "cifar_resnet18": "D", "cifar_resnet50": "P"}


class Gain(NamedTuple):
    setting: str
    images: float
    """Of a class."""
    mean: float
    half: float
    """Of the 95 % interval."""


def draw_gains(settings: Mapping[str, Mapping[str, Mapping[int, Any]]], picture: Path) -> None:
    """A panel a data set, a line a method; numbers at the points are passes over the images.

    Args:
        settings: lines by setting, method and seed.
    """
    panels = list(dict.fromkeys(SETTINGS[setting].data for setting in settings))
    counts = sorted({round(_images(name, methods)) for name, methods in settings.items()})
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels):
        own = {name: methods for name, methods in settings.items() if SETTINGS[name].data == data}
        for index, (method, color) in enumerate(COLORS.items()):
            beside = 1.04 ** (index - 2)  # none hides another
            _draw_method(axes, gains(own, method), method, color, beside, places(own))
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            title=f"{data}, {DATA[data]} classes",
            xlabel="training images of a class",
            xscale="log",
            xlim=(counts[0] / 2, counts[-1] * 2),
        )
        axes.set_xticks(counts, map(str, counts))
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("deepest exit less plain network, points")
    drawn = [(gain.setting, method) for method in COLORS for gain in gains(settings, method)]
    filled = {SETTINGS[setting].network for setting, _ in drawn if _on_line(setting)}
    figure.legend(
        loc="outside lower center",
        ncols=8,
        handles=[
            *(
                Line2D([], [], color=COLORS[method], label=method)
                for method in dict.fromkeys(pair[1] for pair in drawn)
            ),
            *(
                Line2D(
                    [],
                    [],
                    color="black",
                    linestyle="",
                    marker=MARKERS[network],
                    label=network,
                    markerfacecolor="black" if network in filled else "none",
                )
                for network in dict.fromkeys(SETTINGS[setting].network for setting, _ in drawn)
            ),
        ],
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def gains(settings: Mapping[str, Mapping[str, Mapping[int, Any]]], method: str) -> list[Gain]:
    """Over the plain network, for the settings of two or more seeds, by images of a class."""
    found = []
    for name, methods in settings.items():
        values = differences(methods.get(method, {}), methods.get("plain", {}))
        if method != "plain" and len(values) > 1:
            found.append(Gain(name, _images(name, methods), *mean_interval(values)))
    return sorted(found, key=lambda gain: gain.images)


def places(settings: Mapping[str, Mapping[str, Mapping[int, Any]]]) -> dict[str, float]:
    """Images of a class; those of another network or length of training stand left of the line, side by side."""
    counts = {name: _images(name, methods) for name, methods in settings.items()}
    beside = [name for name in counts if not _on_line(name)]
    ranks = {name: sum(counts[other] == counts[name] for other in beside[:i]) + 1 for i, name in enumerate(beside)}
    return {name: count / 1.3 ** ranks.get(name, 0) for name, count in counts.items()}


def _on_line(setting: str) -> bool:
    return setting.rpartition("-")[2].isdigit() or "-" not in setting


def _images(setting: str, methods: Mapping[str, Mapping[int, Any]]) -> float:
    """Of a class, on average."""
    runs = next(filter(None, methods.values()))
    return next(iter(runs.values()))["images"] / DATA[SETTINGS[setting].data]


def _draw_method(
    axes: Axes, found: list[Gain], method: str, color: str, beside: float, place: Mapping[str, float]
) -> None:
    line = [gain for gain in found if _on_line(gain.setting)]
    axes.plot([place[gain.setting] * beside for gain in line], [gain.mean for gain in line], color=color, linewidth=1)
    for gain in found:
        setting, at = SETTINGS[gain.setting], place[gain.setting] * beside
        axes.errorbar(
            at,
            gain.mean,
            gain.half,
            color=color,
            capsize=3,
            markersize=5,
            marker=MARKERS[setting.network],
            markerfacecolor=color if gain in line else "white",
        )
        if method == "ensemble":
            axes.annotate(f"{setting.passes}", (at, gain.mean), (5, 4), textcoords="offset points", fontsize=7)
