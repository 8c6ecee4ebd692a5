"""Ctrl-C and SIGTERM as a polite request, on which all processes agree."""
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

AGREE_EVERY = 10


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
        """Catch SIGINT and SIGTERM; a second signal has its usual effect."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def remember(number: int, _: Any) -> None:
            self.received = signal.Signals(number)
            restore()

        for number in previous:
            signal.signal(number, remember)
        try:
            yield
        finally:
            restore()

    def agree(self, update: int) -> bool:
        """Whether to stop now, the same answer on every process; call it on all of them after each update.

        On GPUs the processes ask each other only every tenth update, since asking waits for the device.
        """
        if self.accelerator.num_processes == 1:
            self.agreed = self.received is not None
        elif self.accelerator.device.type == "cpu" or update % AGREE_EVERY == 0:
            wish = torch.tensor([int(self.received or 0)], device=self.accelerator.device)
            agreed = int(self.accelerator.gather(wish).max())
            self.agreed = agreed > 0
            if agreed:
                self.received = signal.Signals(agreed)
        return self.agreed
