"""Ctrl-C, SIGTERM and SIGUSR1 as a polite request, on which all processes agree."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

AGREE_EVERY = 10
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""SIGUSR1 is what Slurm is asked to send before it takes a machine away; Windows has none."""


def leave_process_group(_: int) -> None:
    """Keep a signal to the whole group from a loading process, which the training process still needs and will end."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
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
        """Catch SIGINT, SIGTERM and SIGUSR1; a second Ctrl-C has its usual effect. The others may come several times:
        from a scheduler, to all processes, and once more from torchrun."""
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
        """Agree whether to stop now (`agreed`) and whether to save, as the main process wishes (returned): the same
        answers on every process; call it on all of them after each update.

        On GPUs the processes ask each other only every tenth update, since asking waits for the device.
        """
        if self.accelerator.num_processes == 1:
            self.agreed = self.received is not None
            return save
        if self.accelerator.device.type != "cpu" and update % AGREE_EVERY:
            return False
        wish = torch.tensor([[int(self.received or 0), int(save)]], device=self.accelerator.device)
        wishes = self.accelerator.gather(wish)
        number = int(wishes[:, 0].max())
        self.agreed = number > 0
        if self.agreed:
            self.received = signal.Signals(number)
        return bool(wishes[0, 1])
