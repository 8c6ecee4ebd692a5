import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ..conftest import small_model
from ..programs import HANGS, ROOT, Programs
from .server import TOKEN, HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """Of a process whose Hub is the one on loopback; its cache lasts for the test."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def command(environment, tmp_path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs a program in that environment; its output never shows the token."""
    with Programs(environment) as programs:

        def run(*args: object, check: bool = True, **more: str) -> subprocess.CompletedProcess:
            if more or "-c" in args:
                done = subprocess.run([*map(str, args)], cwd=tmp_path, env={**environment, **more},
                                      capture_output=True, text=True, timeout=HANGS)
            else:
                done = programs.run(*args, cwd=tmp_path)
            assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            assert TOKEN not in done.stdout + done.stderr
            return done

        yield run


@pytest.fixture
def client(command) -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python code in a process of its own."""
    return lambda code, **more: command(sys.executable, "-c", code, **more)


READER = """
import sys, traceback
for line in sys.stdin:
    try:
        exec(eval(line), {})
    except Exception:
        traceback.print_exc(file=sys.stdout)
    print("\\0", flush=True)
"""


@pytest.fixture
def interpreter(environment, tmp_path) -> Iterator[Callable[[str], str]]:
    """Runs pieces of Python code one after the other in one process, and gives what each printed."""
    errors = (tmp_path / "errors").open("w+")
    process = subprocess.Popen([sys.executable, "-c", READER], cwd=tmp_path, env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    timer = threading.Timer(HANGS, process.kill)
    timer.start()

    def run(code: str) -> str:
        process.stdin.write(repr(code) + "\n")
        process.stdin.flush()
        lines = []
        while (line := process.stdout.readline()) != "\0\n":
            assert line, "the process died"
            lines.append(line)
        assert TOKEN not in "".join(lines)
        return "".join(lines).strip()

    yield run
    process.stdin.close()
    process.wait()
    timer.cancel()
    errors.seek(0)
    assert TOKEN not in errors.read()
    errors.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    small_model().eval().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")
