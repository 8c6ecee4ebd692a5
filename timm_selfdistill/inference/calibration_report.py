"""What a calibration found, as a table and for config.json."""
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass
class CalibrationReport:
    """What calibration found. Accuracies are in per cent, and those of images that had no part in finding it."""

    budget: dict[str, float]
    """What was asked for."""
    met: bool
    """Whether that holds on the last part of the data."""
    accuracy: float
    plain_accuracy: float
    """Of the deepest exit, for all images."""
    shares: list[float]
    """Of the images, per exit; they sum to 1."""
    macs: float
    """Mean multiply-adds of an image."""
    plain_macs: float
    speedup: float | None
    """Expected from the measured times of the exits; only where `min_speedup` was asked for."""
    ece_before: list[float]
    ece_after: list[float]
    """Expected calibration error of every exit without and with its temperature, 0 to 1."""
    policy: str
    thresholds: list[float | None]
    temperatures: list[float]
    images: list[int]
    """Of the three parts: for temperatures, for thresholds, and for all of the above."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Table:
        (name, value), = self.budget.items()
        met = "met" if self.met else "NOT MET"
        table = Table(
            title=f"{name} {value:g}: {met} on {self.images[2]} images", title_justify="left",
            caption=f"top-1 {self.accuracy:.2f} %, plain network {self.plain_accuracy:.2f} %; "
                    f"{self.macs / 1e6:,.1f} M multiply-adds, {self.macs / self.plain_macs:.1%} of the plain network's"
                    + (f"; {self.speedup:.2f}x as fast" if self.speedup else ""), caption_justify="left")
        for column in ("exit", "images", "threshold", "temperature", "ECE before", "ECE after"):
            table.add_column(column, justify="right")
        for exit, share in enumerate(self.shares):
            threshold = self.thresholds[exit] if exit < len(self.thresholds) else None
            table.add_row(
                str(exit), f"{share:.1%}", "" if threshold is None else f"{threshold:.4f}",
                f"{self.temperatures[exit]:.3f}", f"{self.ece_before[exit]:.3f}", f"{self.ece_after[exit]:.3f}")
        return table
