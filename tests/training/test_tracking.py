"""What each tracker gets, read back with its own reader; none needs a server or the net."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.tracking import get_available_trackers
from torch.utils.data import Subset

from timm_selfdistill import Trainer

from ..conftest import ENVIRONMENT, programs, run_python
from ..programs import ROOT
from .test_trainer import fit, interrupt_after, make_task, settings

WINDOWS = {"train_loss", "train_label_loss", "train_distill_loss", "train_hint_loss"}
EPOCHS = {f"{name}_{exit}" for name in ("top1", "top5", "loss") for exit in ("exit_0", "exit_3", "ensemble")}
ALWAYS = {"lr", "images_per_second", "memory_gib"}
"""100 images in batches of 50, a look every update: two updates an epoch."""


@pytest.fixture
def few(fashion_tensors):
    return tuple(Subset(part, range(100)) for part in fashion_tensors)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory that stays empty."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


def wandb_records(path: Path) -> Iterator:
    """Of an offline run: protocol buffers in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def read_wandb(path: Path) -> tuple[str, dict[str, object], dict[int, dict[str, object]]]:
    """Id, configuration and steps of an offline run."""
    id, config, steps = "", {}, {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            id = record.run.run_id
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            steps[record.history.step.num] = values
    return id, config, steps


@pytest.mark.slow
def test_wandb(few, tmp_path, monkeypatch, elsewhere):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    result, _ = fit(run, few, report_to=("wandb",), log_interval=1, settings={"exits": None, "scale": [0.5, 1.0]})
    wandb.teardown()  # its process writes to the end
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    id, config, steps = read_wandb(file)
    assert config["batch_size"] == 50
    assert (config["exits"], config["scale"], config["output"]) == ("None", "[0.5, 1.0]", str(run))
    assert sorted(steps) == [1, 2, 3, 4]
    assert steps[1].keys() >= WINDOWS | ALWAYS
    assert steps[2].keys() >= WINDOWS | ALWAYS | EPOCHS
    assert steps[4]["top1_exit_3"] == result.history[1]["top1_exit_3"]
    for name in ("curves", "exits"):
        (picture,) = steps[4][f"{name}/filenames"]
        assert (file.parent / "files" / picture).read_bytes().startswith(b"\x89PNG")

    fit(run, few, report_to=("wandb",), log_interval=1, epochs=3, resume="latest")
    wandb.teardown()
    (second,) = set(run.glob("wandb/offline-run-*/*.wandb")) - {file}
    assert read_wandb(second)[0] == id
    assert sorted(read_wandb(second)[2]) == [5, 6]


@pytest.mark.slow
def test_mlflow(few, tmp_path, monkeypatch, elsewhere):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, more = tmp_path / "run", {"exits": None, "note": "x" * 7000}
    interrupt_after(monkeypatch, 3)
    fit(run, few, report_to=("mlflow",), log_interval=1, settings=more)
    result, _ = fit(run, few, report_to=("mlflow",), log_interval=1, settings=more, epochs=3, resume="latest")
    assert "MLFLOW_TRACKING_URI" not in os.environ

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'timm-selfdistill'")
    (found,) = client.search_runs([experiment.experiment_id])  # gone on with, not begun again
    assert found.info.run_name == "run"
    assert found.data.params["batch_size"] == "50"
    assert found.data.params["decay_milestones"] == "[90, 180, 270]"
    assert found.data.params["exits"] == "None"
    assert "note" not in found.data.params  # longer than MLflow takes
    assert found.data.metrics.keys() >= WINDOWS | ALWAYS | EPOCHS
    losses = client.get_metric_history(found.info.run_id, "train_loss")
    assert [metric.step for metric in losses] == [1, 2, 3, 4, 5, 6]
    accuracies = client.get_metric_history(found.info.run_id, "top1_exit_3")
    assert [metric.value for metric in accuracies] == [row["top1_exit_3"] for row in result.history]
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["curves.png", "exits.png"]
    assert len(list(run.glob("mlartifacts/*/artifacts/*.png"))) == 2


@pytest.mark.slow
def test_mlflow_writes_where_it_was_told(few, tmp_path, monkeypatch, elsewhere):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/shared.db"
    MlflowClient(store).create_experiment("timm-selfdistill", artifact_location=(tmp_path / "shared").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    for name in "ab":
        fit(tmp_path / name, few, report_to=("mlflow",), epochs=1)
        assert not (tmp_path / name / "mlflow.db").exists()
    (experiment,) = MlflowClient(store).search_experiments(filter_string="name = 'timm-selfdistill'")
    assert {run.info.run_name for run in MlflowClient(store).search_runs([experiment.experiment_id])} == {"a", "b"}
    assert os.environ["MLFLOW_TRACKING_URI"] == store


READ_TRACKIO = """
import json
import trackio
from trackio.sqlite_storage import SQLiteStorage
runs = trackio.Api().runs("timm-selfdistill")
print(json.dumps([[run.name, run.config, SQLiteStorage.get_logs("timm-selfdistill", run.name)] for run in runs]))
"""


@pytest.mark.slow
def test_all_together_on_two_processes(fashion, tmp_path, elsewhere):
    """Every tracker that is installed gets each value once."""
    installed = {tracker.value for tracker in get_available_trackers()}
    names = [name for name in ("tensorboard", "wandb", "mlflow", "trackio") if name in installed]
    fashion.train.select(range(100)).to_parquet(tmp_path / "images/train.parquet")
    fashion.val.select(range(100)).to_parquet(tmp_path / "images/test.parquet")
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    run = tmp_path / "run"
    command = [
        ROOT / "examples/train.py",
        "--data-dir",
        tmp_path / "images",
        "--output",
        run,
        "-j",
        0,
        "--model",
        "test_resnet",
        "-b",
        25,
        "--log-interval",
        1,
        "--epochs",
        2,
        "--report-to",
        *names,
    ]
    for more in ([], ["--epochs", 3, "--resume"]):
        done = programs().run(*command, *more, processes=2, cwd=Path.cwd(), **environment)
        assert done.returncode == 0, done.stderr
        assert "tracker" not in done.stderr
    check_tensorboard(run)
    if "wandb" in names:
        assert len(list(run.glob("wandb/offline-run-*"))) == 2  # one for the start, one that goes on
    if "mlflow" in names:
        assert len(list(run.glob("mlartifacts/*"))) == 1
    if "trackio" in names:
        check_trackio(run, environment)


@pytest.mark.slow
def test_a_process_that_has_reported_ends(few_images, tmp_path, elsewhere):
    """A new one, with all that Python does at its end: forks, as above, leave out the last part."""
    installed = {tracker.value for tracker in get_available_trackers()}
    names = [name for name in ("tensorboard", "wandb", "mlflow") if name in installed]
    done = run_python(
        ROOT / "examples/train.py",
        "--data-dir",
        few_images,
        "--output",
        tmp_path / "run",
        "-j",
        2,
        "--model",
        "test_resnet",
        "-b",
        25,
        "--epochs",
        1,
        "--report-to",
        *names,
        fresh=True,
        WANDB_MODE="offline",
    )
    assert "Traceback" not in done.stderr
    assert "epoch 1, the best of 1" in done.stdout


def check_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "timm-selfdistill")).Reload()
    assert set(events.Tags()["scalars"]) >= WINDOWS | ALWAYS | EPOCHS
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("top1_exit_3")] == [2, 4, 6]
    assert [event.step for event in events.Images("exits")] == [4, 6]


def check_trackio(run: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO], env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ((name, config, rows),) = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("run-")
    assert (config["batch_size"], config["decay_milestones"], config["output"]) == (25, "[90, 180, 270]", str(run))
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row.keys() >= EPOCHS] == [2, 4, 6]
    assert [row["step"] for row in rows if "exits" in row] == [4, 6]
    store = Path(environment["TRACKIO_DIR"])
    assert (store / "media" / next(row["exits"]["file_path"] for row in rows if "exits" in row)).is_file()


@pytest.mark.slow
def test_a_tracker_that_does_not_start_ends_a_new_run_and_not_a_resumed_one(few, tmp_path, monkeypatch):
    fit(tmp_path, few, epochs=1)

    def refuse(*_, **__):
        raise OSError("no quota left")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", refuse)
    with pytest.warns(UserWarning, match=r"tracker tensorboard failed .*\(no quota left\)"):
        assert fit(tmp_path, few, resume="latest", report_to=("tensorboard",))[0].summary
    trainer = Trainer(make_task(), *few, settings(tmp_path / "new", report_to=("tensorboard",)))
    with pytest.raises(RuntimeError, match="tracker tensorboard failed to start: no quota left"):
        trainer.fit()
