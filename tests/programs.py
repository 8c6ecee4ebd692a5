"""Python programs, each in a fork of one process that has imported the libraries, which takes longer than most runs."""
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile

ROOT = Path(__file__).parents[1]
HANGS = 900  # seconds, many times what any program here takes on a slow machine


class Programs:
    """Runs them one after another; libraries have read the environment once, when they were imported."""

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
        return subprocess.CompletedProcess(command, *json.loads(self.server.stdout.readline()))


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
    """Run a script in this process as if python had been started with it."""
    signal.alarm(HANGS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(file.fileno(), number)
    os.chdir(cwd)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    serve()
