"""Accelerate as a run needs it: its precision and its processes."""
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, parse_flag_from_env

from .config import TrainConfig

Answer = TypeVar("Answer")


def create_accelerator(config: TrainConfig) -> Accelerator:
    """An Accelerator in the precision of the config, or else of `accelerate launch`.

    Raises:
        ValueError: a tracker is not installed, fp16 is asked for on a CPU, or config and launcher contradict.
    """
    available = {tracker.value for tracker in get_available_trackers()}
    if unknown := set(config.report_to) - available:
        raise ValueError(f"no tracker {', '.join(sorted(unknown))}; installed: {', '.join(sorted(available))}")
    _check_launcher(config)
    # Accelerate joins the processes that torchrun starts on CPUs only where it is told that there is nothing else.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "fp16" and cpu:
        raise ValueError("fp16 needs a GPU (here it would train in fp32); use amp_dtype bfloat16 or no mixed precision")
    if not cpu:
        torch.set_float32_matmul_precision("high")  # TF32, as timm's train.py
        torch.backends.cudnn.allow_tf32 = True
    AcceleratorState._reset_state()  # which would keep the precision of an earlier run in this process
    # The Trainer divides the loss itself, so Accelerate, which may be told a number by its launcher, must not.
    return Accelerator(
        mixed_precision=precision, cpu=cpu, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))


def ask_main_process(accelerator: Accelerator, call: Callable[[], Answer]) -> Answer:
    """What a call returns on the main process, which alone makes it; an OSError or ValueError is raised on all."""
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [call()]
        except (OSError, ValueError) as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _check_launcher(config: TrainConfig) -> None:
    """What `accelerate launch` was told, against what the run was told."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"accelerate launch asks for {name}, which spreads the weights over the processes; every process must"
                " hold them whole here, see configs/multi_gpu.yaml")
    launched = {
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION"),
        "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }
    own = {"mixed_precision": config.mixed_precision, "gradient_accumulation_steps": str(config.grad_accum_steps)}
    for name, value in launched.items():
        if value not in (None, "no", "1") and own[name] is not None and value != own[name]:
            raise ValueError(
                f"accelerate launch says {name} {value}, the run's own flags say {own[name]}; change one of them")
