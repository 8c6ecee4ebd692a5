"""When does it help? The gain of each method over the plain network, a row for each setting, with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evidence_data import DATA
from evidence_grid import SETTINGS
from evidence_points import differences
from intervals import mean_interval

from timm_selfdistill.pictures import BLUE, GREEN, ORANGE, PURPLE, create_figure, finish

Settings = Mapping[str, Mapping[str, Mapping[int, Any]]]
"""Lines by setting, method and seed."""
STYLES: dict[str, dict[str, Any]] = {
    "dsn": {"color": "dimgray", "marker": "s", "label": "exits that learn from labels alone (dsn)"},
    "paper": {"color": PURPLE, "marker": "v", "label": "the deepest exit teaches, as in the paper"},
    "ensemble": {"color": BLUE, "marker": "o", "label": "the ensemble teaches (default)"},
    "memory": {"color": ORANGE, "marker": "D", "label": "the ensemble's earlier answers teach (memory)"},
    "dks": {"color": GREEN, "marker": "^", "label": "every exit teaches every other (dks)"},
}
"""Of the methods with exits, from the top of a row to its bottom."""
NOUNS = {"families": "typeface", "characters": "character", "fashion": "class of Fashion-MNIST"}


class Gain(NamedTuple):
    setting: str
    images: float
    """Of a class."""
    mean: float
    half: float
    """Of the 95 % interval."""


def draw_gains(settings: Settings, picture: Path) -> None:
    """Draw the gain of the deepest exit over the plain network in points of top-1."""
    found = {method: gains(settings, method) for method in STYLES}
    drawn = {gain.setting: gain.images for gains in found.values() for gain in gains}
    rows = sorted(drawn, key=lambda name: (list(NOUNS).index(SETTINGS[name].data), drawn[name]), reverse=True)
    found = {method: gains for method, gains in found.items() if len(gains) > 1 or len(rows) < 2}
    height = 1.3 + 0.55 * len(rows) + 0.22 * len(found)
    figure = create_figure(8, height)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for index, (method, gains_of_method) in enumerate(found.items()):
        offset = 0.16 * ((len(found) - 1) / 2 - index)
        axes.errorbar(
            [gain.mean for gain in gains_of_method],
            [rows.index(gain.setting) + offset for gain in gains_of_method],
            xerr=[gain.half for gain in gains_of_method],
            linestyle="",
            capsize=2,
            markersize=6,
            **STYLES[method],
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [describe(name, drawn[name]) for name in rows])
    axes.margins(y=0.03)
    finish(axes, xlabel="gain of the deepest exit over the plain network, points of top-1")
    figure.legend(loc="outside lower center", ncols=1, fontsize=10, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def gains(settings: Settings, method: str) -> list[Gain]:
    """Over the plain network, for the settings of two or more seeds, by images of a class."""
    found = []
    for name, methods in settings.items():
        values = differences(methods.get(method, {}), methods.get("plain", {}))
        if method != "plain" and len(values) > 1:
            found.append(Gain(name, _images(name, methods), *mean_interval(values)))
    return sorted(found, key=lambda gain: gain.images)


def describe(name: str, images: float) -> str:
    """The label of a row: data, images of a class, length of training, and the network where it is not the usual."""
    setting = SETTINGS[name]
    network = "" if setting.network == "resnet10-16" else f", {setting.network}"
    return f"{images:.0f} images per {NOUNS[setting.data]},\n{setting.passes} epochs{network}"


def _images(setting: str, methods: Mapping[str, Mapping[int, Any]]) -> float:
    """Of a class, on average."""
    runs = next(filter(None, methods.values()))
    return next(iter(runs.values()))["images"] / DATA[SETTINGS[setting].data]
