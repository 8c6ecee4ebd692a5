"""Accelerate as a run needs it: its precision, its processes, their failures."""

import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

from ..config import TrainConfig


def device_name(device: torch.device | str) -> str:
    """Name of the GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


Answer = TypeVar("Answer")
REFUSED = {
    "DEEPSPEED": "makes its steps in the backward pass, where gradients cannot be accumulated or looked at, and has"
    " checkpoints of its own",
    "FSDP": "shards the weights, of which the exits run parts on their own",
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
    AcceleratorState._reset_state()  # which would keep the precision of an earlier run in this process
    # The Trainer divides the loss itself, so Accelerate, which may be told a number by its launcher, must not.
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    return Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        kwargs_handlers=[kwargs],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


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
    accelerator = None if cpu else torch.accelerator.current_accelerator()
    found = "cpu" if accelerator is None else accelerator.type
    if device.type != found or (device.index or 0) >= torch.accelerator.device_count():
        raise ValueError(
            f"there is no device {name} here, but {'the CPU alone' if found == 'cpu' else found}; give"
            " another, or none, which takes what there is"
        )
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
            raise ValueError(
                f"accelerate launch asks for {name}, which {reason}; take configs/multi_gpu.yaml, and"
                " grad_checkpointing (--grad-checkpointing) where memory is short"
            )
    launched = {
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION"),
        "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }
    own = {"mixed_precision": config.mixed_precision, "gradient_accumulation_steps": str(config.grad_accum_steps)}
    for name, value in launched.items():
        if value not in (None, "no", "1") and own[name] is not None and value != own[name]:
            raise ValueError(
                f"accelerate launch says {name} {value}, the run's own flags say {own[name]}; change one of them"
            )


POLL_SECONDS = 0.5
HEARD_SECONDS = 10.0
"""How long a process that failed stays for the others to hear of it."""
END_SECONDS = 60.0
"""How long a process that has heard of it may take to end by itself."""
_runs = count()


class PeerError(RuntimeError):
    """Another process of the run failed."""


@contextmanager
def sharing_failures(accelerator: Accelerator) -> Iterator[None]:
    """Within it an error on one process ends all of them; call it on every process.

    Where a process failed, whatever waits for it fails or waits forever. The former becomes an error that says what
    happened on the other process, the latter is ended after a minute.

    Raises:
        PeerError: another process failed.
    """
    if accelerator.num_processes == 1:
        yield
        return
    failures = _Failures(_get_default_store(), accelerator.process_index, accelerator.num_processes, next(_runs))
    watch = threading.Thread(target=failures.watch, name="failures", daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        failures.tell(error)
        if failures.told and isinstance(error, RuntimeError):  # as the errors of torch.distributed are
            raise PeerError(failures.told) from error
        raise
    finally:
        failures.over.set()
        watch.join()


def error_line(error: BaseException) -> str:
    """The line of an error that says what it is; one from a loading process carries that process's traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__name__}: ") if "Traceback" in str(error) else lines[0]


class _Failures:
    """What the processes of one run tell each other through the store in which they found one another.

    Attributes:
        told: of another process's error, once there is one.
        over: set when this process needs to hear no more.
    """

    def __init__(self, store: Store, rank: int, world_size: int, run: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.key = f"timm-selfdistill/{run}/failure"
        self.told: str | None = None
        self.over = threading.Event()

    def tell(self, error: Exception) -> None:
        """Tell the others of an error, unless another came first, and wait until they have heard."""
        if self.told:
            return
        with suppress(RuntimeError):  # the process that kept the store is gone
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        message = f"process {self.rank} of {self.world_size} failed: {type(error).__name__}: {error_line(error)}"
        first = self.store.compare_set(self.key, "", message).decode()
        self.store.set(f"{self.key}/{self.rank}", "heard")
        if first != message:
            self.told = first
            return
        until = monotonic() + HEARD_SECONDS
        heard = [f"{self.key}/{rank}" for rank in range(self.world_size)]
        while not self.store.check(heard) and monotonic() < until:
            sleep(POLL_SECONDS / 10)

    def watch(self) -> None:
        """Until this process needs to hear no more."""
        with suppress(RuntimeError):  # the process that kept the store is gone
            self._watch()

    def _watch(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            if not self.store.check([self.key]):
                continue
            told = self.store.get(self.key).decode()
            if not told.startswith(f"process {self.rank} of"):
                self.told = told
                self.store.set(f"{self.key}/{self.rank}", "heard")
                if not self.over.wait(END_SECONDS):
                    print(f"error: {told}; this process waits for it and is ended", file=sys.stderr, flush=True)
                    os._exit(1)
            return
