"""What a calibration found, as a table and for config.json."""

from dataclasses import asdict, dataclass
from typing import cast

from rich.table import Table

from ..hub import CalibrationRecord


@dataclass
class FixedExit:
    """One exit for all images, on the last part of the data."""

    exit: int
    accuracy: float
    macs: float
    speedup: float | None


@dataclass
class CalibrationReport:
    """What calibration found. Accuracies are in per cent, and those of images that had no part in finding it.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import EarlyExit, wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> held_out = [(torch.randn(60, 3, 32, 32), torch.randint(10, (60,))) for _ in range(5)]
        >>> report = EarlyExit(model).calibrate(held_out, max_macs=1e9)
        >>> report.budget, report.met, report.images
        ({'max_macs': 1000000000.0}, True, [100, 100, 100])
        >>> round(sum(report.shares), 6)
        1.0
    """

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
    better_exit: FixedExit | None
    """A fixed exit that keeps the promise on the last part, and which the thresholds do not keep, or keep worse by more
    than chance explains."""
    ece_before: list[float]
    ece_after: list[float]
    """Expected calibration error of every exit without and with its temperature, 0 to 1."""
    policy: str
    thresholds: list[float | None]
    temperatures: list[float]
    images: list[int]
    """Of the three parts: for temperatures, for thresholds, and for all of the above."""

    @property
    def fixed_exit(self) -> int | None:
        """The exit at which all images leave, if there is one."""
        return self.shares.index(1.0) if 1.0 in self.shares else None

    def to_dict(self) -> CalibrationRecord:
        return cast(CalibrationRecord, asdict(self))

    def __rich__(self) -> Table:
        ((name, value),) = self.budget.items()
        met = "met" if self.met else "NOT MET"
        table = Table(
            title=f"{name} {value:g}: {met} on {self.images[2]} images",
            title_justify="left",
            caption="\n".join(self._sentences()),
            caption_justify="left",
        )
        for column in ("exit", "images", "threshold", "temperature", "ECE before", "ECE after"):
            table.add_column(column, justify="right")
        for exit, share in enumerate(self.shares):
            threshold = self.thresholds[exit] if exit < len(self.thresholds) else None
            table.add_row(
                str(exit),
                f"{share:.1%}",
                "" if threshold is None else f"{threshold:.4f}",
                f"{self.temperatures[exit]:.3f}",
                f"{self.ece_before[exit]:.3f}",
                f"{self.ece_after[exit]:.3f}",
            )
        return table

    def _sentences(self) -> list[str]:
        lines = [
            f"top-1 {self.accuracy:.2f} %, plain network {self.plain_accuracy:.2f} %; "
            + self._cost_words(self.macs, self.speedup)
        ]
        if self.fixed_exit == len(self.thresholds):
            lines.append("no image leaves early: this is the plain network")
        elif self.fixed_exit is not None:
            lines.append(f"all images leave at exit {self.fixed_exit}, as with truncate({self.fixed_exit})")
        if self.better_exit is not None:
            better = self.better_exit
            lines.append(
                f"exit {better.exit} for all images is better: top-1 {better.accuracy:.2f} %; "
                + self._cost_words(better.macs, better.speedup)
            )
        return lines

    def _cost_words(self, macs: float, speedup: float | None) -> str:
        words = f"{macs / 1e6:,.1f} M multiply-adds, {macs / self.plain_macs:.1%} of the plain network's"
        return words + (f"; {speedup:.2f}x as fast" if speedup else "")
