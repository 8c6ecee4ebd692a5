"""Python scripts, each in a fork of one process that has imported the libraries, which takes longer than most runs."""

import atexit
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import NoReturn

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from timm_selfdistill.training.outputs import metrics as summary

ROOT = Path(__file__).parents[1]
HANGS = 240
"""Seconds, ten times what any process here takes on two slow processors; less than what pytest gives a test."""


class Program:
    """A script that was started, on one process or several.

    Attributes:
        folders: for each process, where its output and what becomes of it are written.
        server: of which the processes are forks.
        limit: seconds after which they count as hanging.
    """

    def __init__(self, command: list[str], folders: list[Path], server: subprocess.Popen, limit: int):
        self.command, self.folders, self.server, self.limit = command, folders, server, limit
        self.began, self.failed = time.monotonic(), 0

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._read("stderr")

    @property
    def pids(self) -> list[int]:
        self._wait_for(lambda: all((folder / "pid").exists() for folder in self.folders))
        return [int((folder / "pid").read_text()) for folder in self.folders]

    def poll(self) -> int | None:
        """The exit code, or None while it runs; where one of the processes fails, the others are killed."""
        codes = [
            int(path.read_text()) if path.exists() else None for path in (folder / "code" for folder in self.folders)
        ]
        self.failed = self.failed or next(filter(None, codes), 0)  # that of the first which fails
        if self.failed:
            self.kill()
        return self.failed if self.failed or None not in codes else None

    def wait(self) -> subprocess.CompletedProcess:
        self._wait_for(lambda: self.poll() is not None)
        code = self.poll()
        assert code != -signal.SIGALRM, f"{self.command} hangs:\n{self.stdout[-3000:]}\n{self.stderr[-6000:]}"
        return subprocess.CompletedProcess(self.command, code, self.stdout, self.stderr)

    def terminate(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """End all that runs of it, loading processes included."""
        for pid, folder in zip(self.pids, self.folders):
            if not (folder / "code").exists():
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(pid, signal.SIGKILL)
        self._wait_for(lambda: all((folder / "code").exists() for folder in self.folders))

    def _read(self, name: str) -> str:
        return "".join(path.read_text() for folder in self.folders if (path := folder / name).exists())

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.server.poll() is None, f"the process died of which {self.command} was to be a fork"
            assert time.monotonic() - self.began < self.limit + 20, f"{self.command} does not end"
            time.sleep(0.005)


class Programs:
    """Runs scripts, each process in a session of its own.

    They share what the libraries read from the environment when they were imported, and the seed of Python's hashes: a
    test that is about either starts new processes.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.place = TemporaryDirectory(prefix="programs-")
        self.server: subprocess.Popen | None = None
        self.started: list[Program] = []

    def end_all(self) -> None:
        """Kill what a test has left running."""
        while self.started:
            program = self.started.pop()
            if program.poll() is None and program.server.poll() is None:
                program.kill()

    def run(self, *command: object, **settings: object) -> subprocess.CompletedProcess:
        """Start a script, and wait for its end."""
        return self.start(*command, **settings).wait()

    def start(
        self,
        *command: object,
        cwd: Path = ROOT,
        processes: int = 1,
        limit: int = HANGS,
        **environment: str,
    ) -> Program:
        """A script of Python with its arguments, or after "-m" a package of the repository; "python" may stand before
        it. Its name alone is looked for in PATH.

        Args:
            processes: that find one another as torchrun's do.
            limit: seconds after which they count as hanging.
            environment: set in addition.
        """
        script, *arguments = map(str, command[1:] if command[0] in ("python", sys.executable) else command)
        if script == "-m":
            script, *arguments = str(ROOT / arguments[0] / "__main__.py"), *arguments[1:]
        if not script.endswith(".py"):
            script = shutil.which(script, path=self.environment["PATH"])
        if self.server is None or self.server.poll() is not None:
            self.server = subprocess.Popen(
                [sys.executable, __file__], cwd=ROOT, env=self.environment, text=True, stdin=subprocess.PIPE
            )
        if processes > 1:
            environment = {
                **environment,
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
        folders = [Path(mkdtemp(dir=self.place.name)) for _ in range(processes)]
        for rank, folder in enumerate(folders):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            print(
                json.dumps([str(folder), str(cwd), limit, {**environment, **place}, script, *arguments]),
                file=self.server.stdin,
                flush=True,
            )
        self.started.append(Program([script, *arguments], folders, self.server, limit))
        return self.started[-1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def serve() -> None:
    """Start what each line of the standard input asks for, until its end."""
    importlib.import_module("timm_selfdistill.cli.main")  # and with it `datasets`
    summary.TIMED_SECONDS, summary.ROUNDS = 0.0, 1  # each exit is timed once
    Figure.savefig = save_dot
    wandb = sys.modules.get("wandb.sdk.data_types._private")
    if wandb:  # which makes a folder that the first fork to end would remove
        atexit.unregister(wandb.MEDIA_TMP.cleanup)
        wandb.MEDIA_TMP._finalizer.detach()
    gc.freeze()  # forks share the memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks that wait for scripts are reaped automatically
    for line in sys.stdin:
        if os.fork() == 0:
            folder, *script = json.loads(line)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child = os.fork()
            if child == 0:
                become(Path(folder), *script)
            record(Path(folder) / "pid", child)
            record(Path(folder) / "code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
    if wandb:
        wandb.MEDIA_TMP.cleanup()


def save_dot(figure: Figure, path: Path, **_: object) -> None:
    """In the place of `Figure.savefig`: the figure is made, but not rendered, which takes longer than most runs."""
    Image.new("L", (1, 1)).save(path, "png")


def record(path: Path, number: int) -> None:
    path.with_suffix(".new").write_text(str(number))
    path.with_suffix(".new").rename(path)


def become(folder: Path, cwd: str, limit: int, environment: dict[str, str], script: str, *arguments: str) -> NoReturn:
    """Run a script in this process as python does that is started with it, and end."""
    os.setsid()
    signal.alarm(limit)
    for number, (name, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), ("stdout", os.O_CREAT | os.O_WRONLY), ("stderr", os.O_CREAT | os.O_WRONLY)]
    ):
        os.dup2(os.open(folder / name, flags | os.O_APPEND), number)
    sys.stdin = os.fdopen(0)  # without the lines that the server has read ahead
    os.chdir(cwd)
    os.environ.update(environment)
    np.random.seed()
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = os.path.abspath(script)
    code: object = 0
    try:
        exec(compile(Path(script).read_bytes(), main.__file__, "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # The end of Python but for its last part, the removal of all modules, which takes half a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()
