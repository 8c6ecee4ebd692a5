"""An error on one process, which ends the others too: they would wait for it."""
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from time import monotonic, sleep

from accelerate import Accelerator
from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

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
