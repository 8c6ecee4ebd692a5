"""Error messages and exit codes shared by all commands of the package."""

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
"""Exit code of a run that completed training, but could not upload its model."""
CLOSED_PIPE = 141
"""Exit code if the output pipe was closed: 128 + SIGPIPE, as for other programs piped into `head`."""
LONGEST_LINE = 2000
"""Maximum number of characters of an error message."""


def run(main: Callable[[], int | None]) -> None:
    """Run a program and exit. An error is printed as one line, with exit code 2; TIMM_SELFDISTILL_DEBUG=1 shows the
    traceback. If the output pipe was closed, the program ends silently.

    Of several processes on a machine only the first prints errors and warnings."""
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
        if expected and alike:  # the main process prints the same error, or that this one failed
            sys.exit(2)
        line = error_line(error)
        more = "" if expected else f" ({DEBUG_VARIABLE}=1 shows where)"
        name = os.path.basename(sys.argv[0]).replace("__main__.py", "timm-selfdistill")
        print(f"{name}: error: {printable(line[:LONGEST_LINE])}{more}", file=sys.stderr)
        sys.exit(2)


def _flushed(main: Callable[[], int | None]) -> int | None:
    """Run a program and flush its output, since an error while Python flushes at exit could not be caught."""
    try:
        return main()
    finally:
        if sys.stdout:
            sys.stdout.flush()


def _is_closed_pipe(error: BaseException) -> bool:
    """Whether a program ended because its output pipe was closed; remaining output is then discarded.

    A connection or the pipe to a DataLoader worker may break, too, so the output pipes themselves are polled.
    """
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)  # from rich, which has discarded the rest
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):  # Windows has no poll
        return False
    outputs = select.poll()
    for output in (1, 2):
        outputs.register(output, 0)
    closed = [output for output, event in outputs.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for output in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return bool(closed)


def say(*lines: str) -> None:
    """Print lines on the main process."""
    if os.environ.get("RANK", "0") == "0":
        print(*map(printable, lines), sep="\n", flush=True)


def printable(text: str) -> str:
    """Replace unprintable characters, which could control the terminal, in text from outside."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def parse_exit(exit: str) -> int | str:
    """Return an exit as an index if it is a number, otherwise as a name."""
    return int(exit) if re.fullmatch("-?[0-9]{1,9}", exit) else exit


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError instead of printing the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: .*?(--[^\s=]+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[1], known, 1) if unknown else []
        raise ValueError(f"{message}; {f'did you mean {close[0]}?' if close else '--help lists the flags'}")
