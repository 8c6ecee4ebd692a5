import gc
import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from matplotlib.figure import Figure
from torch import nn

from timm_selfdistill import SelfDistillModel, load_images, model_data_config, wrap_self_distill
from timm_selfdistill.cli.main import main

from .hub.server import TOKEN, HubServer
from .programs import HANGS, ROOT, Programs, save_dot

EMBEDDED = ROOT / "examples/data"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Of new processes."""
ENVIRONMENT.pop("MLFLOW_TRACKING_URI", None)  # a server that is not for tests
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def pytest_collection_finish() -> None:
    """What the libraries hold stays; looking through it again and again takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _torch_as_before():
    """A test that left gradients off or autocast on would make others fail, and has found a fault."""
    before = torch_modes()
    yield
    assert torch_modes() == before


def torch_modes() -> dict[str, object]:
    """What torch does in this thread until it is told otherwise."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast on a GPU": torch.is_autocast_enabled("cuda"),
        "default dtype": torch.get_default_dtype(),
    }


@pytest.fixture
def unrendered(monkeypatch):
    """Pictures of runs are made, but not rendered; test_examples.py looks at real ones."""
    monkeypatch.setattr(Figure, "savefig", save_dot)


@pytest.fixture(autouse=True)
def _few_timings(monkeypatch):
    """At the end of a run each exit is timed once, not for 2 seconds."""
    monkeypatch.setattr("timm_selfdistill.training.outputs.metrics.ROUNDS", 1)
    monkeypatch.setattr("timm_selfdistill.training.outputs.metrics.TIMED_SECONDS", 0.0)


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


@pytest.fixture(scope="session")
def few_images(tmp_path_factory):
    """333 training and 101 test images as parquet: odd numbers, so that processes get different shares."""
    folder = tmp_path_factory.mktemp("images")
    images = load_images(EMBEDDED)
    images.train.select(range(333)).to_parquet(folder / "train.parquet")
    images.val.select(range(101)).to_parquet(folder / "test.parquet")
    return folder


@pytest.fixture
def workplace(tmp_path):
    """A folder that looks like the repository, with few images in examples/data."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "README.md", "LICENSE", "timm_selfdistill"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "examples" / "data").mkdir(parents=True)
    for name in (
        "train.py",
        "predict.py",
        "early_exit.py",
        "onnx_early_exit.py",
        "efficientnet_lite0.py",
        "add_exits.py",
        "ankle_boot.png",
    ):
        (folder / "examples" / name).symlink_to(ROOT / "examples" / name)
    images = load_images(EMBEDDED)
    images.train.select(range(64)).to_parquet(folder / "examples/data/train.parquet")
    images.val.select(range(320)).to_parquet(folder / "examples/data/test.parquet")
    return folder


@pytest.fixture
def photos(workplace):
    """The same with a folder of pictures, one folder a class; as many to validate as a calibration needs."""
    images = load_images(EMBEDDED)
    for split, rows in (("train", images.train.select(range(64))), ("val", images.val.select(range(320)))):
        for number, row in enumerate(rows):
            path = workplace / f"photos/{split}/class{row['label']}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return workplace


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


@pytest.fixture(scope="session")
def hub_place(tmp_path_factory) -> Iterator[tuple[HubServer, dict[str, str], Programs]]:
    """A Hub on loopback, the environment of somebody who is logged in there, and programs in that environment."""
    home = tmp_path_factory.mktemp("hub-home")
    with HubServer() as server:
        environment = {
            **ENVIRONMENT,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        yield server, environment, Programs(environment)


@pytest.fixture
def hub(hub_place) -> Iterator[HubServer]:
    """An empty Hub; the clients' cache is empty, too."""
    server, environment, programs = hub_place
    shutil.rmtree(environment["HF_HOME"], ignore_errors=True)
    yield server
    programs.end_all()
    server.reset()


@pytest.fixture
def environment(hub, hub_place) -> dict[str, str]:
    """Of a new process whose Hub is `hub`."""
    return dict(hub_place[1])


@pytest.fixture
def hub_programs(hub, hub_place) -> Programs:
    """Whose Hub is `hub`."""
    return hub_place[2]


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a file of benchmarks/ anew, and those that it imports."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == folder:
            del sys.modules[name]


@pytest.fixture
def learning_rates(benchmarks, monkeypatch):
    """Sets the grid of `evidence.py`."""

    def replace(*lrs):
        points = benchmarks("evidence_points")
        grid = [{"lr": lr, "weight_decay": 5e-4} for lr in lrs]
        monkeypatch.setattr(points, "SCRATCH", points.SCRATCH._replace(grid=grid))

    return replace


def run_python(
    *args: object,
    processes: int = 1,
    launcher: tuple[str, ...] = (),
    fresh: bool = False,
    check: bool = True,
    limit: int = HANGS,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a script of the repository, on as many processes; `fresh` or with a launcher in new ones, not in forks."""
    if launcher or fresh:
        command = [sys.executable, *launcher, *map(str, args)]
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=limit
        )
    else:
        done = programs().run(*args, processes=processes, limit=limit, **environment)
    if check and done.returncode:
        raise AssertionError(f"{args} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


@cache
def programs() -> Programs:
    """Of all tests whose programs need no Hub."""
    return Programs(ENVIRONMENT)


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    yield
    programs().end_all()


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
