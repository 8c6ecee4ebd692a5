"""Progress display, intervals, and profiling of updates."""

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProfileKwargs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config import parse_interval


class Interval:
    """An interval in updates or in time.

    Args:
        text: see `parse_interval`.
    """

    def __init__(self, text: str):
        self.updates, self.seconds = parse_interval(text)
        self.last = time.monotonic()

    def is_due(self, updates: int) -> bool:
        """Whether the number of updates is a multiple of the interval; the same on every process."""
        return self.updates > 0 and updates % self.updates == 0

    def is_overdue(self) -> bool:
        """Whether the time of the interval has passed, by the clock of this process."""
        return self.seconds > 0 and time.monotonic() - self.last >= self.seconds

    def restart(self) -> None:
        """Start measuring the time anew."""
        self.last = time.monotonic()


PLAIN_LINE_SECONDS = 30.0


class ProgressReporter:
    """Reports the progress of updates and epochs.

    Args:
        total_updates: updates of the whole run.
        done_updates: updates done before this process started.
        enabled: False on all processes but the main one.
    """

    def __init__(self, total_updates: int, done_updates: int, enabled: bool, console: Console | None = None):
        self.console = console or Console(quiet=not enabled, soft_wrap=True)
        self.total_updates, self.done_updates, self.first_update = total_updates, done_updates, done_updates
        self.began = self.last_line = time.perf_counter()
        self.live = enabled and self.console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
            transient=True,
        )
        self.task = self.bar.add_task("", total=total_updates, completed=done_updates, note="")

    def __enter__(self) -> "ProgressReporter":
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bar.stop()

    def resume(self, done_updates: int) -> None:
        """Set the number of updates that a resumed run has already done."""
        self.done_updates = self.first_update = done_updates
        self.bar.update(self.task, completed=done_updates)

    def advance(self) -> None:
        """Count one finished update."""
        self.done_updates += 1
        if self.live:
            self.bar.advance(self.task)

    def note(self, epoch: int, epochs: int, loss: float, images_per_second: float) -> None:
        """Show the progress within an epoch; without a terminal, print at most one line every 30 seconds."""
        text = f"loss {loss:.3f}  {images_per_second:,.0f} images/s"
        self.bar.update(self.task, description=f"epoch {epoch + 1}/{epochs}", note=text)
        if not self.live and time.perf_counter() - self.last_line > PLAIN_LINE_SECONDS:
            updates = f"{self.done_updates}/{self.total_updates}"
            self.say(f"epoch {epoch + 1}/{epochs}  {updates}  {text}  left {self.time_left()}")

    def count(self, what: str, done: int, total: int) -> None:
        """Show the progress of a step before training; without a terminal, print as rarely as `note`."""
        text = f"{what} {done:,}/{total:,} images"
        self.bar.update(self.task, description=text)
        if not self.live and time.perf_counter() - self.last_line > PLAIN_LINE_SECONDS:
            self.say(text)

    def restart_clock(self) -> None:
        """Restart the clock behind `time_left`, so that work before the first update does not count."""
        self.began = time.perf_counter()

    def say(self, line: str) -> None:
        """Print one line."""
        self.last_line = time.perf_counter()
        self.console.print(line, highlight=False, markup=False)

    def wait(self, what: str, is_done: Callable[[float], bool]) -> None:
        """Wait until something is done, and show what and for how long.

        Args:
            is_done: waits up to the given number of seconds and returns whether it is done.
        """
        began = time.perf_counter()
        if not self.live:
            self.say(what)
        with self.console.status(what) if self.live else nullcontext() as status:
            while not is_done(0.5 if self.live else PLAIN_LINE_SECONDS):
                text = f"{what}, {_clock(time.perf_counter() - began)}"
                self.say(text) if status is None else status.update(text)

    def time_left(self) -> str:
        done = max(1, self.done_updates - self.first_update)
        seconds = (time.perf_counter() - self.began) / done * (self.total_updates - self.done_updates)
        return _clock(seconds)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


WAIT, WARM_UP = 3, 2


class UpdateProfiler:
    """Traces updates with the PyTorch profiler, skipping the first five, for chrome://tracing and Perfetto.

    Args:
        updates: number of updates to trace; 0 is off.
        folder: where each process writes profile_RANK.json.
    """

    def __init__(self, accelerator: Accelerator, updates: int, folder: Path):
        self.left = updates and WAIT + WARM_UP + updates
        self.stack = ExitStack()
        if updates:
            schedule = {"wait": WAIT, "warmup": WARM_UP, "active": updates, "repeat": 1}
            activities = ["cpu", "cuda"] if accelerator.device.type == "cuda" else ["cpu"]
            self.profiler = self.stack.enter_context(
                accelerator.profile(
                    ProfileKwargs(
                        activities=activities,
                        schedule_option=schedule,
                        profile_memory=True,
                        output_trace_dir=str(folder),
                    )
                )
            )

    def step(self) -> None:
        """Count one update; after the last traced one, write the trace."""
        if self.left:
            self.profiler.step()
            self.left -= 1
            if not self.left:
                self.stack.close()

    def finish(self) -> None:
        """End profiling at the end of the run."""
        if self.left:
            self.left = 0
            self.stack.pop_all()  # not closed: there is nothing to write, and torch 2.8 crashes if stopped this early
            warnings.warn("no profile was written: the run ended before the updates to be traced", stacklevel=2)
