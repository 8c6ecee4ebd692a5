"""Accelerate as a run needs it: its precision, its processes, its trackers."""
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import parse_flag_from_env

from .config import TrainConfig


def create_accelerator(config: TrainConfig) -> Accelerator:
    """An Accelerator in the precision of the config, or else of `accelerate launch`.

    Raises:
        ValueError: a tracker is not installed, or fp16 is asked for on a CPU.
    """
    available = {tracker.value for tracker in get_available_trackers()}
    if unknown := set(config.report_to) - available:
        raise ValueError(f"no tracker {', '.join(sorted(unknown))}; installed: {', '.join(sorted(available))}")
    # Accelerate joins the processes that torchrun starts on CPUs only where it is told that there is nothing else.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "fp16" and cpu:
        raise ValueError("fp16 needs a GPU (here it would train in fp32); use amp_dtype bfloat16 or no mixed precision")
    AcceleratorState._reset_state()  # which would keep the precision of an earlier run in this process
    return Accelerator(mixed_precision=precision, cpu=cpu)


def start_trackers(accelerator: Accelerator, config: TrainConfig, output: Path) -> None:
    """Start the trackers of the config; those that write files write into `output`."""
    if not config.report_to:
        return
    accelerator.project_configuration.set_directories(str(output))
    accelerator.log_with = filter_trackers(list(config.report_to), accelerator.logging_dir)
    settings = {**config.to_dict(), "output": str(output)}
    accelerator.init_trackers("timm-selfdistill", config={
        key: value for key, value in settings.items() if isinstance(value, (str, int, float))})
