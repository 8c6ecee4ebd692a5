"""What `import timm_selfdistill` brings with it, and how long it takes; the other benchmarks of waiting."""

import json
import subprocess
import sys
from operator import attrgetter

import pytest

import timm_selfdistill
from timm_selfdistill import training

from .conftest import ENVIRONMENT, run_python

LATE = (
    "accelerate",
    "datasets",
    "pandas",
    "pyarrow",
    "matplotlib",
    "timm_selfdistill.analysis",
    "timm_selfdistill.cli",
    "timm_selfdistill.training",
    "timm.task",
    "wandb.sdk",
    "mlflow",
    "trackio",
    "torch.utils.tensorboard",
    "onnx",
    "onnxruntime",
)
"""What takes long to import, and is needed by some only."""
ADDED = f"""
import json, sys
import timm
before = set(sys.modules)
import timm_selfdistill
print(json.dumps([name for name in {LATE} if name in sys.modules and name not in before]))
"""


def test_what_takes_long_is_imported_where_it_is_used():
    done = subprocess.run([sys.executable, "-c", ADDED], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("module", [timm_selfdistill, training])
def test_every_public_name_is_there(module):
    assert all(getattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match="'nothing'"):
        attrgetter("nothing")(module)


@pytest.mark.benchmark
def test_the_loading_benchmark_runs(tmp_path):
    run_python("benchmarks/loading.py", "--rounds", 1, "--images", 32, "-b", 8, "--output", tmp_path / "a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["ratio"] > 0


@pytest.mark.benchmark
def test_the_listing_benchmark_runs(tmp_path):
    run_python("benchmarks/listing.py", "--rounds", 1, "--classes", 5, "--images", 20, "--output", tmp_path / "a.json")
    assert [row["what"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["seconds", "mebibytes"]


@pytest.mark.benchmark
def test_the_benchmark_runs(tmp_path):
    run_python("benchmarks/import_time.py", "--rounds", 1, "--output", tmp_path / "a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["ratio"] > 0


@pytest.mark.benchmark
def test_the_benchmark_of_help_runs(tmp_path):
    run_python("benchmarks/help.py", "--rounds", 1, "--commands", "recipes", "--output", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["command"] for row in rows] == ["", "recipes"]
    assert all(row["ratio"] > 0 for row in rows)
