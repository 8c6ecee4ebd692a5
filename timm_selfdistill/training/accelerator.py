"""Accelerate as a run needs it: its precision and its processes."""
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    parse_flag_from_env,
)

from .config import TrainConfig

Answer = TypeVar("Answer")
REFUSED = {
    "DEEPSPEED": "makes its steps in the backward pass, where gradients cannot be accumulated or looked at, and has"
                 " checkpoints of its own (fsdp_reshard_after_forward: false is like its ZeRO-2)",
    "MEGATRON_LM": "needs a model of its own",
    "PARALLELISM_CONFIG": "lets several processes work on one image",
}


def create_accelerator(config: TrainConfig, find_unused: bool = False) -> Accelerator:
    """An Accelerator in the precision of the config, or else of `accelerate launch`.

    Args:
        find_unused: there may be parameters without gradients, for which DistributedDataParallel must not wait.

    Raises:
        ValueError: a tracker is not installed, fp16 is asked for on a CPU, or config and launcher contradict.
    """
    available = {tracker.value for tracker in get_available_trackers()}
    if unknown := set(config.report_to) - available:
        raise ValueError(f"no tracker {', '.join(sorted(unknown))}; installed: {', '.join(sorted(available))}")
    _check_launcher(config)
    # Accelerate joins the processes that torchrun starts on CPUs only where it is told that there is nothing else.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    cpu = not _choose_device(config.device, cpu) if config.device else cpu
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "fp16" and cpu:
        raise ValueError("fp16 needs a GPU (here it would train in fp32); use amp_dtype bfloat16 or no mixed precision")
    if not cpu:
        torch.set_float32_matmul_precision("high")  # TF32, as timm's train.py
        torch.backends.cudnn.allow_tf32 = True
    # Which would keep the precision of an earlier run in this process, and with FSDP not find the processes again.
    AcceleratorState._reset_state(reset_partial_state=parse_flag_from_env("ACCELERATE_USE_FSDP"))
    # The Trainer divides the loss itself, so Accelerate, which may be told a number by its launcher, must not.
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    accelerator = Accelerator(
        mixed_precision=precision, cpu=cpu, kwargs_handlers=[kwargs],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError("FSDP needs GPUs, and processes that accelerate launch starts; see configs/fsdp2.yaml")
    return accelerator


def _choose_device(name: str, cpu: bool) -> bool:
    """Whether a run is on an accelerator, by the name of its device; its number is that of a process alone.

    Args:
        cpu: whether there is nothing else.

    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:1, ..., got {name!r}") from error
    if device.type == "cpu":
        return False
    found = "cpu" if cpu else torch.accelerator.current_accelerator().type
    if device.type != found or (device.index or 0) >= torch.accelerator.device_count():
        raise ValueError(f"there is no device {name} here, but {'the CPU alone' if found == 'cpu' else found}; give"
                         " another, or none, which takes what there is")
    if device.index is not None and "LOCAL_RANK" not in os.environ:  # else each process has its own
        torch.accelerator.set_device_index(device.index)
    return True


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
    for name, reason in REFUSED.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(f"accelerate launch asks for {name}, which {reason}; take FSDP2, see configs/fsdp2.yaml")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _check_fsdp()
    launched = {
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION"),
        "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }
    own = {"mixed_precision": config.mixed_precision, "gradient_accumulation_steps": str(config.grad_accum_steps)}
    for name, value in launched.items():
        if value not in (None, "no", "1") and own[name] is not None and value != own[name]:
            raise ValueError(
                f"accelerate launch says {name} {value}, the run's own flags say {own[name]}; change one of them")


def _check_fsdp() -> None:
    """What `accelerate launch` was told about FSDP."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate launch asks for FSDP1; set fsdp_version: 2, see configs/fsdp2.yaml")
    for name in ("offload_params", "cpu_ram_efficient_loading", "activation_checkpointing"):
        if parse_flag_from_env(f"FSDP_{name.upper()}"):
            raise ValueError(
                f"accelerate launch asks for fsdp_{name}, which is not supported; set it to false"
                + (", and grad_checkpointing in the run" if name == "activation_checkpointing" else ""))
    if os.environ.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        raise ValueError(
            "accelerate launch asks for SIZE_BASED_WRAP, which wraps parts that are never called; set"
            " fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, for which the blocks of any network are found")
