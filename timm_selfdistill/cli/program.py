"""What every program of the package does: errors in one line, and exit codes."""

import argparse
import difflib
import os
import re
import select
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import datasets
from huggingface_hub.utils import disable_progress_bars

from ..training.runtime.accelerator import PeerError, error_line

DEBUG_VARIABLE = "TIMM_SELFDISTILL_DEBUG"
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, AssertionError, ImportError)
NOT_UPLOADED = 3
"""Exit code of a run that trained to its end, but whose model is not on the Hub."""
CLOSED_PIPE = 141
"""Exit code where nobody reads the output any more: 128 + SIGPIPE, as of other programs in front of `head`."""
LONGEST_LINE = 2000
"""Characters of an error."""


def run(main: Callable[[], int | None]) -> None:
    """Run a program; an error becomes one line and exit code 2. TIMM_SELFDISTILL_DEBUG=1 shows the traceback.
    It ends silently where the program behind a pipe no longer reads.

    Of several processes on a machine the first one speaks for all."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        datasets.disable_progress_bars()
        disable_progress_bars()
    alike = os.environ.get("LOCAL_RANK", "0") != "0"
    if alike:
        warnings.simplefilter("ignore")
    warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
    try:
        sys.exit(_flushed(main))
    except (*USER_ERRORS, SystemExit) as error:
        if _is_closed_pipe(error):
            sys.exit(CLOSED_PIPE)
        if isinstance(error, SystemExit) or os.environ.get(DEBUG_VARIABLE):
            raise
        expected = isinstance(error, (ValueError, OSError, FloatingPointError, PeerError))
        if expected and alike:  # the main process says the same, or that this one failed
            sys.exit(2)
        line = error_line(error)
        more = "" if expected else f" ({DEBUG_VARIABLE}=1 shows where)"
        name = os.path.basename(sys.argv[0]).replace("__main__.py", "timm-selfdistill")
        print(f"{name}: error: {printable(line[:LONGEST_LINE])}{more}", file=sys.stderr)
        sys.exit(2)


def _flushed(main: Callable[[], int | None]) -> int | None:
    """Run it, and write what it printed: an error of that at Python's own end could not be caught."""
    try:
        return main()
    finally:
        if sys.stdout:
            sys.stdout.flush()


def _is_closed_pipe(error: BaseException) -> bool:
    """Whether a program ended since its output is a pipe that nobody reads; what is left to write is dropped then.

    A connection or a pipe to a DataLoader worker may break, too, so the outputs themselves are asked.
    """
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)  # from rich, which has dropped the rest
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):  # which Windows does not have
        return False
    outputs = select.poll()
    for output in (1, 2):
        outputs.register(output, 0)
    closed = [output for output, event in outputs.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for output in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return bool(closed)


def say(*lines: str) -> None:
    """Print lines, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(*map(printable, lines), sep="\n", flush=True)


def printable(text: str) -> str:
    """A text that may come from outside, without characters that could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def parse_exit(exit: str) -> int | str:
    """A number, or a name."""
    return int(exit) if re.fullmatch("-?[0-9]{1,9}", exit) else exit


class Parser(argparse.ArgumentParser):
    """Raises instead of printing forty lines of usage."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: .*?(--[^\s=]+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[1], known, 1) if unknown else []
        raise ValueError(f"{message}; {f'did you mean {close[0]}?' if close else '--help lists the flags'}")
