"""After training: early exit."""
from .calibration import CalibrationReport
from .early_exit import EarlyExit, EarlyExitOutput

__all__ = ["CalibrationReport", "EarlyExit", "EarlyExitOutput"]
