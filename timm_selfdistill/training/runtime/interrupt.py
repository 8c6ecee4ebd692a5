"""Ctrl-C, SIGTERM and SIGUSR1 as requests to stop, on which all processes agree."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

AGREE_EVERY = 10
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Signals that stop a run. Slurm can be told to send SIGUSR1 before a job's time limit; Windows does not have it."""


def leave_process_group(_: int) -> None:
    """Keep signals sent to the process group away from a DataLoader worker: the training process still needs it and
    shuts it down itself."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Context manager in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class InterruptRequest:
    """Remembers a signal until the training loop can stop between two updates."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT, SIGTERM and SIGUSR1; a second Ctrl-C has its usual effect. The other two may arrive repeatedly,
        from a scheduler that signals every process and again from torchrun."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in STOPPING}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def remember(number: int, _: object) -> None:
            self.received = signal.Signals(number)
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

        for number in previous:
            signal.signal(number, remember)
        try:
            yield
        finally:
            restore()

    def agree(self, update: int, save: bool = False) -> bool:
        """Agree with all processes whether to stop now; call it on every process after each update.

        On GPUs the processes communicate only every tenth update, since this synchronizes the device.

        Args:
            save: whether this process wants a checkpoint.

        Returns:
            Whether the main process wants one; the decision to stop is in `agreed`.
        """
        if self.accelerator.num_processes == 1:
            self.agreed = self.received is not None
            return save
        if self.accelerator.device.type != "cpu" and update % AGREE_EVERY:
            return False
        request = torch.tensor([[int(self.received or 0), int(save)]], device=self.accelerator.device)
        requests = self.accelerator.gather(request)
        number = int(requests[:, 0].max())
        self.agreed = number > 0
        if self.agreed:
            self.received = signal.Signals(number)
        return bool(requests[0, 1])
