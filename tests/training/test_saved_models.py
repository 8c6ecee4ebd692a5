"""What is recorded, and so published, of a run."""

import json

import pytest
import timm
from accelerate import Accelerator
from torch import nn

from timm_selfdistill import TrainConfig, hub
from timm_selfdistill.training.outputs import metrics as summary
from timm_selfdistill.training.outputs.metrics import ExitMetrics
from timm_selfdistill.training.outputs.saved_models import SavedModels

from ..conftest import small_model

METRICS = [*(ExitMetrics(index, 50.0, 90.0, 1.0) for index in range(4)), ExitMetrics("ensemble", 50.0, 90.0, 1.0)]


class Images(list):
    source = None


def record(tmp_path, model: nn.Module | None = None, source=None, **config) -> dict:
    """Of a saved model."""
    images = Images([(None, 0)] * 7)
    images.source = source
    saved = SavedModels(tmp_path / "run", TrainConfig(**config), Accelerator(cpu=True), images, images, (3, 32, 32))
    saved.val_images = 7  # as the evaluation counts them
    saved.save("best", model or small_model(), 1, METRICS)
    return json.loads((tmp_path / "run/best/config.json").read_text())["self_distill"]["metrics"]


def test_no_place_on_this_machine_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs/data").mkdir(parents=True)
    private = {
        "data_dir": "data",
        "dataset": "theirs/data",
        "model": "local-dir:runs/first/best",
        "a": str(tmp_path),
        "b": "~/secret",
        "c": "../secret",
        "d": ["C:\\secret"],
        "e": {"f": "/secret"},
    }
    public = {"head": "linear", "aa": "rand-m9-mstd0.5", "dataset_config": "user/name", "scale": [0.5, 1.0]}
    settings = record(tmp_path, output=str(tmp_path / "run"), settings={**private, **public})["settings"]
    assert not settings.keys() & {"output", "resume", *private}
    assert {key: settings[key] for key in public} == public
    assert settings["lr"] == 0.05


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"settings": {"pretrained": False}}, {"license": "apache-2.0"}),
        ({"settings": {"pretrained": True}}, {"base_model": "timm/test_resnet.r160_in1k"}),
        (
            {"settings": {"pretrained": True}, "hub_license": "mit"},
            {"base_model": "timm/test_resnet.r160_in1k", "license": "mit"},
        ),
        ({}, {}),
    ],
)
def test_licence_and_base_model_are_those_of_the_weights_it_began_with(config, expected, tmp_path):
    found = record(tmp_path, **config)
    assert {key: found[key] for key in ("license", "base_model") if key in found} == expected


def test_the_licence_of_a_run_is_the_cards(tmp_path):
    model = small_model()
    model.backbone.pretrained_cfg["license"] = "cc-by-nc-4.0"
    for config, expected in (
        ({}, "cc-by-nc-4.0"),
        ({"settings": {"pretrained": False}}, "apache-2.0"),
        ({"hub_license": "mit"}, "mit"),
    ):
        record(tmp_path, model, **config)
        assert f"license: {expected}" in (tmp_path / "run/best/README.md").read_text()


@pytest.mark.parametrize("source", [None, "a folder", {"name": "mine"}])
def test_a_data_set_of_which_little_is_known(source, tmp_path):
    assert record(tmp_path, source=source)["dataset"] is None
    assert "top-1" in (tmp_path / "run/best/README.md").read_text()


def test_a_data_set_that_says_where_it_is_from(tmp_path):
    source = {"name": "mine", "type": "imagefolder", "split": "test"}
    assert record(tmp_path, source=source)["dataset"] == {**source, "images": 7}


def test_the_picture_of_each_model_shows_its_own_figures(tmp_path, monkeypatch):
    drawn = {"saved": [], "run": []}
    for kind, place in (("saved", "hub.saving.plot_exits"), ("run", "hub.plot_exits")):

        def plot(path, name, rows, kind=kind, **_):
            path.write_text(kind)
            drawn[kind].append([row["top1"] for row in rows])

        monkeypatch.setattr(f"timm_selfdistill.{place}", plot)
    images = Images([(None, 0)] * 7)
    saved = SavedModels(tmp_path, TrainConfig(), Accelerator(cpu=True), images, images, (3, 32, 32))
    model, later = small_model(), [metric._replace(top1=metric.top1 - 10) for metric in METRICS]
    saved.save("best", model, 1, METRICS)
    saved.save("last", model, 2, later)
    assert drawn == {"saved": [], "run": []}
    saved.draw_missing()
    assert drawn["saved"] == [[metric.top1 for metric in metrics] for metrics in (METRICS, later)]
    saved.save("last", model, 2, later)
    written = saved.summarize(model, (1, METRICS), (2, later))
    assert drawn["run"] == [[metric.top1 for metric in METRICS]]
    assert drawn["saved"][2:] == [[metric.top1 for metric in later]]
    assert [(tmp_path / name / "exits.png").read_text() for name in ("best", "last")] == ["run", "saved"]
    for name, rows in (("best", written["exits"]), ("last", written["last"]["exits"])):
        assert hub.read_metrics(tmp_path / name)["exits"] == rows
        assert rows[-2]["speedup"] == 1.0
    assert (written["epoch"], written["last"]["epoch"], written["epochs"]) == (1, 2, 2)


def test_a_speed_up_that_is_noise_is_left_out(monkeypatch):
    steady, noisy = [2.0, 2.1, 1.9, 2.0, 2.0, 2.1, 2.0], [1.0, 9.0, 3.0, 0.5, 6.0, 2.0, 8.0]
    monkeypatch.setattr(summary, "time_ratios", lambda *args, **settings: [steady, noisy, steady, steady])
    model = small_model()
    rows = summary.with_speedups(model, summary.exit_costs(model, (3, 32, 32)), (3, 32, 32))
    assert [row.get("speedup") for row in rows] == [2.0, None, 2.0, 1.0, 2.0]


def test_a_plain_networks_record_is_where_timm_does_not_look(tmp_path):
    images = Images([(None, 0)])
    saved = SavedModels(tmp_path, TrainConfig(), Accelerator(cpu=True), images, images, (3, 32, 32))
    saved.save("best", timm.create_model("test_resnet", num_classes=3), 1, METRICS[:1])
    config = json.loads((tmp_path / "best/config.json").read_text())
    assert config["metrics"]["exits"][0]["top1"] == 50.0
    assert timm.create_model(f"local-dir:{tmp_path}/best", pretrained=True).num_classes == 3
