"""What is recorded of a model in JSON, key by key: its exits, its training, its calibration.

The types hold for what this package writes. A file from elsewhere may have anything under these keys: its readers
check what they take.
"""

from typing import Any, TypedDict


class _Exit(TypedDict):
    exit: int | str
    """0..C-1, "ensemble", or "early" for early exit."""


class ExitRow(_Exit, total=False):
    """Cost and accuracy of a classifier or of the ensemble, as far as they are known."""

    top1: float
    """Per cent."""
    top5: float
    """Per cent."""
    loss: float
    """Mean cross entropy, nats."""
    module: str
    """After which the exit branches off; empty for a plain model."""
    params: int
    macs: float
    """Multiply-adds of an image."""
    share: float
    """Of the plain network's multiply-adds."""
    speedup: float
    """Measured time of the plain network over that of the exit."""


class CurvePoint(TypedDict):
    """Early exit with one threshold for all exits."""

    threshold: float | None
    """None lets no image leave early."""
    top1: float
    """Per cent."""
    macs: float
    """Mean multiply-adds of an image."""


class ImageSource(TypedDict, total=False):
    """Where validation images come from, in the Hub's terms."""

    name: str
    type: str
    config: str | None
    split: str
    hub_id: str
    val_fraction: float
    """With seed and drawn_from, where they were drawn from the training split."""
    seed: int
    drawn_from: str | None
    """See `fingerprint`."""
    images: int
    """Of those, the ones that something was measured on."""


class CalibrationRecord(TypedDict, total=False):
    """What is read of a `CalibrationReport` in "early_exit" of a config.json, which holds all of it."""

    accuracy: float
    plain_accuracy: float
    macs: float
    plain_macs: float
    policy: str
    thresholds: list[float | None]
    temperatures: list[float]
    dataset: ImageSource
    """The images that it is of."""


class TrainingRecord(TypedDict, total=False):
    """What `Trainer` records of a model: "metrics" of a config.json."""

    exits: list[ExitRow]
    base_model: str
    """On the Hub: the weights that the training began with."""
    license: str
    dataset: ImageSource | None
    """The validation images."""
    reference: str
    """"deepest" where there are no labels: accuracies then tell how often an exit agrees with it."""
    settings: dict[str, Any]
    """Of the run, see `TrainConfig`."""
    versions: dict[str, str]
    hardware: str
    frozen: bool
    images: list[int]
    """How many the run trained on and measured."""
    epoch: int
    """From 1."""
