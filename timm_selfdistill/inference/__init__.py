"""After training: early exit."""

from .batch_run import EarlyExitOutput
from .calibration_report import CalibrationReport
from .early_exit import EarlyExit

__all__ = ["CalibrationReport", "EarlyExit", "EarlyExitOutput"]
