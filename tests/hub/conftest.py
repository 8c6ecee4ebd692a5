import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from ..conftest import ROOT, small_model
from .server import TOKEN, HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python code in a process of its own, whose Hub is the one on loopback; its cache lasts for the test."""

    def run(code: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": TOKEN,
               "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
               **environment}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
                              timeout=120)
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert TOKEN not in done.stdout + done.stderr
        return done

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
