import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from ..conftest import small_model
from ..programs import HANGS
from .server import TOKEN


@pytest.fixture
def command(environment, hub_programs, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a program whose Hub is the one on loopback; `fresh` in a new process. Its output never shows the token."""

    def run(*args: object, check: bool = True, fresh: bool = False, **more: str) -> subprocess.CompletedProcess:
        if fresh:
            done = subprocess.run(
                [*map(str, args)],
                cwd=tmp_path,
                env={**environment, **more},
                capture_output=True,
                text=True,
                timeout=HANGS,
            )
        else:
            done = hub_programs.run(*args, cwd=tmp_path, **more)
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def client(command, tmp_path) -> Callable[..., str]:
    """Runs Python code in a process of its own; what it prints."""

    def run(code: str, **more) -> str:
        (tmp_path / "client.py").write_text(code)
        return command(sys.executable, tmp_path / "client.py", **more).stdout.strip()

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    small_model().eval().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")
