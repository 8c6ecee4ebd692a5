"""The record of a training run in a saved model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import hub
from ..training.data.images import FULL_RANGES, ValueRange, ValueRanges
from ..training.data.sources import ValFraction
from ..training.outputs.run_directory import CONFIG_FILE


@dataclass(frozen=True)
class Record:
    """Settings and images of a run, as far as they are known.

    Attributes:
        model: name of the model as given.
        settings: settings from config.yaml if the model is in a run directory, else those saved with the model, which
            lack paths.
        dataset: source of the validation images, see `ImageSplits.source`.
        images: numbers of training and validation images.
        revision: commit of the record, for a repository on the Hub.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    images: tuple[int, int] | None = None
    revision: str | None = None

    def text(self, name: str) -> str | None:
        """Return a setting that is a string; None for any other value, which an untrusted file may contain."""
        value = self.settings.get(name)
        return value if isinstance(value, str) else None

    @property
    def source(self) -> str | None:
        """Folder, file or dataset on the Hub that the run trained on."""
        return self.text("dataset") or self.text("data_dir") or self.dataset.get("hub_id")

    @property
    def fraction(self) -> ValFraction | None:
        """Fraction and seed with which validation images were drawn from the training split; None if they were a split
        of their own."""
        share, seed = self.dataset.get("val_fraction"), self.dataset.get("seed")
        if isinstance(share, float) and 0 < share < 1 and type(seed) is int:
            return ValFraction(share, seed)
        return None

    @property
    def drawn_from(self) -> str | None:
        """Fingerprint of the images that the validation images were drawn from."""
        return self.dataset.get("drawn_from")

    @property
    def train_split(self) -> str:
        drawn_from = str(self.dataset.get("split")).partition(" of ")[2] if self.fraction else None
        return self.text("train_split") or drawn_from or "train"

    @property
    def dataset_config(self) -> str | None:
        """Configuration of a dataset on the Hub."""
        return self.text("dataset_config") or self.dataset.get("config")

    @property
    def val_split(self) -> str | None:
        """The validation split; None if it was drawn or is unknown."""
        split = self.dataset.get("split")
        return split if isinstance(split, str) and self.fraction is None else None

    @property
    def value_range(self) -> ValueRange | ValueRanges | None:
        """Black and white of images with more than 8 bits."""
        if given := as_range(self.settings.get("value_range")):
            return given
        chosen = self.settings.get("value_ranges")
        ranges = {kind: as_range(chosen.get(kind)) for kind in FULL_RANGES} if isinstance(chosen, dict) else {}
        return {kind: found for kind, found in ranges.items() if found} or None


def read_record(model: str, revision: str | None = None) -> Record:
    """Read the record of a saved model: a folder, possibly in a run directory, or a repository on the Hub.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: config.yaml of the run directory is damaged.
    """
    folder = hub.fetch_model(model, revision=revision, only_config=True)
    return record_in(folder, model, hub.pin(model, folder, revision))


def record_in(folder: Path, model: str, revision: str | None = None) -> Record:
    """Read the record of a saved model whose config.json is in a folder.

    Args:
        model: name of the model.

    Raises:
        ValueError: config.json, or config.yaml of the surrounding run directory, is damaged.
    """
    metrics = hub.read_metrics(folder)
    metrics = metrics if isinstance(metrics, dict) else {}
    saved, dataset, images = (metrics.get(key) for key in ("settings", "dataset", "images"))
    counted = None
    if isinstance(images, list) and [type(count) for count in images] == [int, int]:
        counted = images[0], images[1]
    return Record(
        model,
        _run_settings(folder) or (saved if isinstance(saved, dict) else {}),
        dataset if isinstance(dataset, dict) else {},
        counted,
        revision,
    )


def _run_settings(model: Path) -> dict[str, Any] | None:
    """Read config.yaml of the run that a model is best/ or last/ of; None if there is none."""
    path = model.resolve().parent / CONFIG_FILE
    if model.resolve().name not in ("best", "last") or not path.is_file():
        return None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must contain the settings of a run, got {type(settings).__name__}")
    return settings


def as_range(value: Any) -> ValueRange | None:
    """Return a pair of numbers; None for any other value that a file may contain."""
    numbers = [part for part in value if isinstance(part, (int, float))] if isinstance(value, (list, tuple)) else []
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None
