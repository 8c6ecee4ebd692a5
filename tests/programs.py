"""Python scripts, each in a fork of one process that has imported the libraries, which takes longer than most runs."""
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

ROOT = Path(__file__).parents[1]
HANGS = 3600  # seconds, ten times what any process here takes on two slow processors


class Programs:
    """Runs scripts one after another.

    They share what the libraries read from the environment when they were imported, and the seed of Python's hashes: a
    test that is about either, or compares two runs, starts new processes.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.server: subprocess.Popen | None = None

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *_: object) -> None:
        if self.server:
            self.server.communicate()

    def run(self, *command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        """A script of Python with its arguments, "python" before it or not; its name alone is looked for in PATH."""
        script, *arguments = map(str, command[1:] if command[0] in ("python", sys.executable) else command)
        if not script.endswith(".py"):
            script = shutil.which(script, path=self.environment["PATH"])
        self.server = self.server or subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=self.environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)
        print(json.dumps([str(cwd), script, *arguments]), file=self.server.stdin, flush=True)
        answer = self.server.stdout.readline()
        if not answer:
            self.server = None
            raise RuntimeError(f"the process died of which {script} was to be a fork")
        code, out, errors = json.loads(answer)
        assert code != -signal.SIGALRM, f"{command} hangs:\n{out[-3000:]}\n{errors[-6000:]}"
        return subprocess.CompletedProcess(command, code, out, errors)


def serve() -> None:
    importlib.import_module("timm_selfdistill.cli.main")  # and with it torch, timm, datasets and the others
    gc.freeze()  # or the end of a fork takes 2 seconds
    for line in sys.stdin:
        with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                become(*json.loads(line), files=(out, errors))
                break
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(json.dumps([code, *(file.seek(0) or file.read() for file in (out, errors))]), flush=True)


def become(cwd: str, script: str, *arguments: str, files) -> None:
    """Run a script in this process as python does that is started with it."""
    signal.alarm(HANGS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(file.fileno(), number)
    os.chdir(cwd)
    np.random.seed()
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = os.path.abspath(script)
    exec(compile(Path(script).read_bytes(), main.__file__, "exec"), main.__dict__)


if __name__ == "__main__":
    serve()
