"""What is recorded of a model: accuracy and cost of every exit, and what `timm-selfdistill tradeoff` wrote."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..hub import CurvePoint, ExitRow, early_exit_words, measured_rows
from ..model import SelfDistillModel

TRADEOFF, GALLERY = "tradeoff.json", "gallery.png"


@dataclass(frozen=True)
class Recorded:
    """Attributes:
    rows: of every exit and the ensemble; accuracy where it was measured.
    images: how many the accuracies were measured on.
    source: where these images come from.
    agreement: whether top1 tells how often an exit agrees with the deepest one, not with labels.
    calibrated: early exit with the saved thresholds, on the same images; None where that was not measured.
    promise: what the calibration found on images held out from it, in words.
    curve: early exit with one threshold for all exits.
    gallery: a picture of images from easy to hard.
    """

    rows: list[ExitRow]
    images: int | None = None
    source: str | None = None
    agreement: bool = False
    calibrated: CurvePoint | None = None
    promise: str | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    gallery: Path | None = None


def read_recorded(
    model: SelfDistillModel, folder: Path, metrics: Mapping[str, Any] | None, tradeoff: Path | None = None
) -> Recorded:
    """What is known of a saved model.

    Args:
        folder: that it was loaded from.
        metrics: of its config.json.
        tradeoff: a folder that `timm-selfdistill tradeoff` wrote; None looks for its files beside the model and in the
            run directory that the model is in.

    Raises:
        FileNotFoundError: `tradeoff` is given and has no tradeoff.json.
        ValueError: that file is damaged.
    """
    metrics = metrics if isinstance(metrics, dict) else {}
    dataset = metrics.get("dataset")
    dataset = dataset if isinstance(dataset, dict) else {}
    images = dataset.get("images")
    rows, curve, calibrated = model.card_rows(metrics), [], []
    place = find_tradeoff(folder, tradeoff)
    if place is not None:
        measured = _read_tradeoff(place / TRADEOFF)
        rows = measured_rows(measured) or rows
        images = measured.get("images")
        curve, calibrated = _points(measured.get("early_exit")), _points([measured.get("calibrated")])
    return Recorded(
        rows,
        images if isinstance(images, int) and images > 0 else None,
        f"{dataset['name']}, split {dataset.get('split')}" if place is None and "name" in dataset else None,
        place is None and metrics.get("reference") is not None,
        calibrated[0] if calibrated else None,
        early_exit_words(model.early_exit),
        curve,
        place / GALLERY if place is not None and (place / GALLERY).is_file() else None,
    )


def find_tradeoff(folder: Path, given: Path | None) -> Path | None:
    """The folder with the files of `timm-selfdistill tradeoff` for a saved model; None where there is none.

    Raises:
        FileNotFoundError: one is given, and has none.
    """
    if given is not None:
        if not (given / TRADEOFF).is_file():
            raise FileNotFoundError(
                f"{given} has no {TRADEOFF}; expected a folder that timm-selfdistill tradeoff MODEL --output {given}"
                " wrote"
            )
        return given
    places = [folder, *([folder.resolve().parent] if folder.resolve().name in ("best", "last") else [])]
    return next((place for place in places if (place / TRADEOFF).is_file()), None)


def _read_tradeoff(path: Path) -> dict[str, Any]:
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); write it again with timm-selfdistill tradeoff") from error
    if not isinstance(measured, dict):
        raise ValueError(f"{path} must hold an object, got {type(measured).__name__}; write it again")
    return measured


def _points(points: Any) -> list[CurvePoint]:
    """Of a list in a file, those that have both coordinates."""
    return [
        {"threshold": point.get("threshold"), "top1": float(point["top1"]), "macs": float(point["macs"])}
        for point in (points if isinstance(points, list) else [])
        if isinstance(point, dict) and all(type(point.get(key)) in (int, float) for key in ("top1", "macs"))
    ]
