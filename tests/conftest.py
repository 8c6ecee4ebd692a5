import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_selfdistill import SelfDistillModel, load_images, model_data_config, wrap_self_distill
from timm_selfdistill.cli.main import main

from .programs import HANGS, ROOT, Programs

EMBEDDED = ROOT / "examples/data"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_backbone(name: str = "test_resnet", num_classes: int = 10, in_chans: int = 3, **kwargs) -> nn.Module:
    return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)


def small_model(name: str = "test_resnet", num_classes: int = 10, in_chans: int = 3, **kwargs) -> SelfDistillModel:
    return wrap_self_distill(small_backbone(name, num_classes, in_chans), **kwargs)


@pytest.fixture(scope="session")
def fashion():
    """400 training and 100 test images of Fashion-MNIST."""
    images = load_images(EMBEDDED)
    images.train, images.val = images.train.select(range(400)), images.val.select(range(100))
    return images


@pytest.fixture(scope="session")
def fashion_tensors(fashion):
    """The same without augmentation, normalised for one channel at 32 px: training and validation data sets."""
    config = model_data_config(small_backbone(in_chans=1), 32, in_chans=1)
    return fashion.transformed(config, no_aug=True)


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Runs timm-selfdistill in the `folder` of a test's file; its exit code, output and errors."""
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["timm-selfdistill", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()
    return run


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a file of benchmarks/ anew, and those that it imports."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == folder:
            del sys.modules[name]


def run_python(*args: object, launcher: tuple[str, ...] = (), fresh: bool = False, check: bool = True,
               **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the repository; `fresh`, with a launcher or an environment of its own in a new process."""
    if launcher or fresh or environment:
        command = [sys.executable, *launcher, *map(str, args)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True,
                              timeout=HANGS)
    else:
        done = _programs().run(*args)
    if check and done.returncode:
        raise AssertionError(f"{args} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


@cache
def _programs() -> Programs:
    return Programs(ENVIRONMENT)


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
