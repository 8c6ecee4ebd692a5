"""Setup of Accelerate for a run: precision, processes, and failures that processes share."""

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
    """Return the name of the GPU or CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


Answer = TypeVar("Answer")
REFUSED = {
    "DEEPSPEED": "steps the optimizer during the backward pass, where gradients can be neither accumulated nor"
    " inspected, and writes its own checkpoints",
    "FSDP": "shards the weights, while exits run parts of the network on their own",
    "MEGATRON_LM": "needs its own model classes",
    "PARALLELISM_CONFIG": "spreads one image over several processes",
}


def create_accelerator(config: TrainConfig, find_unused: bool = False) -> Accelerator:
    """Create an Accelerator in the precision of the config, or, if it sets none, of `accelerate launch`.

    Args:
        find_unused: whether some parameters may get no gradients, which DistributedDataParallel must not wait for.

    Raises:
        ValueError: a tracker is not installed, fp16 is requested on a CPU, or config and launcher disagree.
    """
    available = {tracker.value for tracker in get_available_trackers()}
    if unknown := set(config.report_to) - available:
        raise ValueError(f"unknown tracker {', '.join(sorted(unknown))}; installed: {', '.join(sorted(available))}")
    _check_launcher(config)
    # Accelerate joins processes that torchrun starts on CPUs only if told explicitly that they run on CPUs.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    cpu = not _choose_device(config.device, cpu) if config.device else cpu
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision == "fp16" and cpu:
        raise ValueError("fp16 needs a GPU (a CPU would train in fp32); use amp_dtype bfloat16 or no mixed precision")
    if not cpu:
        torch.set_float32_matmul_precision("high")  # TF32, as in timm's train.py
        torch.backends.cudnn.allow_tf32 = True
    AcceleratorState._reset_state()  # else it keeps the precision of an earlier run in this process
    # The Trainer divides the loss itself, so Accelerate must not, even if its launcher sets a number of steps.
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    return Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        kwargs_handlers=[kwargs],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


def _choose_device(name: str, cpu: bool) -> bool:
    """Whether the named device is an accelerator. Its index is used only if no launcher assigns a device per process.

    Args:
        cpu: whether the CPU is the only device.

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
            f"device {name} is not available here, only {'the CPU' if found == 'cpu' else found}; choose another"
            " device, or leave it out to use what is available"
        )
    if device.index is not None and "LOCAL_RANK" not in os.environ:  # under a launcher each process has its own device
        torch.accelerator.set_device_index(device.index)
    return True


def ask_main_process(accelerator: Accelerator, call: Callable[[], Answer]) -> Answer:
    """Call a function on the main process and return its result on all; an OSError or ValueError is raised on all."""
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
    """Raise ValueError if the settings of `accelerate launch` are unsupported or contradict those of the run."""
    for name, reason in REFUSED.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"accelerate launch requests {name}, which {reason}; use configs/multi_gpu.yaml, and"
                " grad_checkpointing (--grad-checkpointing) if memory is short"
            )
    launched = {
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION"),
        "gradient_accumulation_steps": os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }
    own = {"mixed_precision": config.mixed_precision, "gradient_accumulation_steps": str(config.grad_accum_steps)}
    for name, value in launched.items():
        if value not in (None, "no", "1") and own[name] is not None and value != own[name]:
            raise ValueError(
                f"accelerate launch sets {name} {value}, the run's own flags set {own[name]}; change one of them"
            )


POLL_SECONDS = 0.5
HEARD_SECONDS = 10.0
"""How long a failed process waits until the others have received its error."""
END_SECONDS = 60.0
"""How long a process that received an error may take to exit by itself."""
_runs = count()


class PeerError(RuntimeError):
    """Another process of the run failed."""


@contextmanager
def sharing_failures(accelerator: Accelerator) -> Iterator[None]:
    """Context manager in which an error on one process ends all processes; enter it on every process.

    When a process fails, collective operations on the others either fail or block forever. A failing one is re-raised
    as an error that says what happened on the failed process; a process that blocks is ended after a minute.

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
        failures.publish(error)
        if failures.told and isinstance(error, RuntimeError):  # as the errors of torch.distributed are
            raise PeerError(failures.told) from error
        raise
    finally:
        failures.over.set()
        watch.join()


def error_line(error: BaseException) -> str:
    """Return the line of an error message that names the cause; a DataLoader worker's error contains a traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__name__}: ") if "Traceback" in str(error) else lines[0]


class _Failures:
    """Errors that the processes of a run share through the store they used to rendezvous.

    Attributes:
        told: message about another process's error, None until there is one.
        over: set when this process no longer needs to listen.
    """

    def __init__(self, store: Store, rank: int, world_size: int, run: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.key = f"timm-selfdistill/{run}/failure"
        self.told: str | None = None
        self.over = threading.Event()

    def publish(self, error: Exception) -> None:
        """Send an error to the other processes, unless one failed first, and wait until they have received it."""
        if self.told:
            return
        with suppress(RuntimeError):  # the process that hosts the store is gone
            self._publish(error)

    def _publish(self, error: Exception) -> None:
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
        """Listen for an error of another process until `over` is set."""
        with suppress(RuntimeError):  # the process that hosts the store is gone
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
                    print(f"error: {told}; this process is blocked and will be ended", file=sys.stderr, flush=True)
                    os._exit(1)
            return
