"""A trace of a few updates."""
import warnings
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProfileKwargs

WAIT, WARM_UP = 3, 2


class UpdateProfiler:
    """Traces some updates after the first five of this start of the run, for chrome://tracing and Perfetto.

    Args:
        updates: how many; 0 is none.
        folder: gets a profile_RANK.json for each process.
    """

    def __init__(self, accelerator: Accelerator, updates: int, folder: Path):
        self.left = updates and WAIT + WARM_UP + updates
        self.stack = ExitStack()
        if updates:
            schedule = {"wait": WAIT, "warmup": WARM_UP, "active": updates, "repeat": 1}
            activities = ["cpu", "cuda"] if accelerator.device.type == "cuda" else ["cpu"]
            self.profiler = self.stack.enter_context(accelerator.profile(ProfileKwargs(
                activities=activities, schedule_option=schedule, profile_memory=True, output_trace_dir=str(folder))))

    def step(self) -> None:
        """An update is done; after the last one that is traced, the trace is written."""
        if self.left:
            self.profiler.step()
            self.left -= 1
            if not self.left:
                self.stack.close()

    def finish(self) -> None:
        """At the end of the run."""
        if self.left:
            self.left = 0
            self.stack.pop_all()  # not closed: there is nothing to write, and torch 2.8 crashes when it stops so early
            warnings.warn("the run ended before the updates that were to be traced; there is no profile", stacklevel=2)
