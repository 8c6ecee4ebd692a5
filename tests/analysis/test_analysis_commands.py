"""flat-minima, gradients, separability and agreement as programs, with right and wrong arguments."""

import json
import re

import pytest
import timm
import torch
from torch.utils.data import Subset

import timm_selfdistill
from timm_selfdistill import (
    SelfDistillLoss,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    model_data_config,
    wrap_self_distill,
)
from timm_selfdistill.baselines import FitNetTask, MutualLearningTask
from timm_selfdistill.cli import analysis
from timm_selfdistill.cli.opening import load_checkpoints
from timm_selfdistill.hub import save_metrics, save_timm_model
from timm_selfdistill.task import learned_state
from timm_selfdistill.training.state.checkpoint import Checkpoints
from timm_selfdistill.training.state.snapshot import Snapshot

from ..conftest import EMBEDDED, small_backbone, small_model

SETTINGS = {"temperature": 2.0, "alpha": 0.5, "beta": 0.1, "hint": "none", "teacher": "ensemble", "lr": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """80 images, a self-distilled model with plain twin, and models that do not fit."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("analysis")
    images = load_images(EMBEDDED)
    images.train.select(range(50)).to_parquet(folder / "data/train.parquet")
    images.val.select(range(80)).to_parquet(folder / "data/test.parquet")
    backbone = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    model_data_config(backbone, 32, 1, class_names=images.class_names)
    save_timm_model(backbone, folder / "plain/best")
    model = wrap_self_distill(backbone, exits=["layer2"])
    model.save_pretrained(folder / "run/best", metrics={"settings": SETTINGS}, check=False)
    model.save_pretrained(folder / "frozen", metrics={"settings": SETTINGS | {"freeze_backbone": True}}, check=False)
    model.truncate(0).save_pretrained(folder / "short", check=False)
    wrap_self_distill(timm.create_model("test_resnet", num_classes=3, in_chans=1)).save_pretrained(
        folder / "other", check=False
    )
    (folder / "afile").write_text("")
    return folder


def written(folder, stem: str) -> dict:
    assert (folder / f"out/{stem}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / f"out/{stem}.json").read_text())
    assert found["data"] == {"name": "data", "type": "imagefolder", "split": "test"}
    assert found["device"] == "cpu"
    assert found["batch_size"] in (40, 64)
    assert found["versions"] == {
        "timm_selfdistill": timm_selfdistill.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    assert found["hardware"]
    return found["models"]


@pytest.mark.slow
def test_flat_minima_compares_models(call, folder):
    code, out, _ = call(
        "flat-minima",
        "plain",
        "run",
        "--data",
        "data",
        "--levels",
        "0.3",
        "0.1",
        "--draws",
        "2",
        "-j",
        "1",
        "--device",
        "cpu",
        "--output",
        "out",
    )
    assert code == 0
    assert out.endswith("wrote out/flat_minima.json, out/flat_minima.png\n")
    models = written(folder, "flat_minima")
    assert list(models) == ["plain", "run"]
    assert models["plain"]["levels"] == [0, 0.1, 0.3]
    assert models["plain"]["images"] == 80
    plain = [row["top1"] for row in models["plain"]["rows"]]
    assert [row["top1"] for row in models["run"]["rows"] if row["exit"] == 1] == plain  # the same weights and noise
    code, out, _ = call(
        "flat-minima",
        "run",
        "--data",
        "data",
        "--unscaled",
        "--levels",
        "0.01",
        "--draws",
        "1",
        "--noise-seed",
        "3",
        "--output",
        "out",
    )
    assert code == 0
    assert "noise the same on every weight; draws: 1, images: 80" in out
    found = written(folder, "flat_minima_unscaled")["run"]
    assert (found["scaled"], found["seed"]) == (False, 3)


def test_gradients_measures_models_by_their_own_loss(call, folder):
    code, out, _ = call("gradients", "plain", "run", "--data", "data", "-b", "40", "--output", "out")
    assert code == 0
    assert out.endswith("wrote out/gradients.json, out/gradients.png\n")
    models = written(folder, "gradients")
    for report in models.values():
        assert report["sections"] == ["layer2", "layer4"]
        assert report["batches"] == 2
        assert all(value > 0 for value in report["gradients"])
    assert models["plain"]["criterion"] == "CrossEntropyLoss()"
    assert models["run"]["criterion"] == (
        "SelfDistillLoss(temperature=2.0, alpha=0.5, beta=0.1, hint=None, teacher='ensemble', t_squared=True)"
    )


TRAINED = SETTINGS | {"alpha": 0.3, "hint": "map", "distill_loss_weight": None}


@pytest.mark.parametrize(
    ("metrics", "criterion"),
    [
        (None, repr(SelfDistillLoss())),
        ({"settings": {"lr": 0.1}}, repr(SelfDistillLoss())),
        (
            {"settings": TRAINED | {"method": "self-distill"}},
            "SelfDistillLoss(temperature=2.0, alpha=0.3, beta=0.1, hint='map', teacher='ensemble', t_squared=True)",
        ),
        (
            {"settings": TRAINED | {"method": "self-distill", "teacher": "memory", "memory_topk": None}},
            "SelfDistillLoss(temperature=2.0, alpha=0.3, beta=0.1, hint='map', teacher='ensemble', t_squared=True)",
        ),
        (
            {"settings": TRAINED | {"method": "dsn"}},
            "SelfDistillLoss(temperature=3.0, alpha=0.0, beta=0.0, hint=None, teacher='ensemble', t_squared=True)",
        ),
        ({"settings": TRAINED | {"method": "dks"}}, "KnowledgeSynergyLoss(distill_loss_weight=1.0)"),
        ({"settings": {"method": "dks", "distill_loss_weight": 2}}, "KnowledgeSynergyLoss(distill_loss_weight=2)"),
    ],
)
def test_the_loss_is_that_of_the_method(metrics, criterion, call, folder):
    model = small_model(in_chans=1)
    model_data_config(model.backbone, 32, 1)
    model.save_pretrained(folder / "own", metrics=metrics, check=False)
    code, _, err = call("gradients", "own", "--data", "data", "--output", "out")
    assert code == 0, err
    assert written(folder, "gradients")["own"]["criterion"] == criterion


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"settings": [1]}, r"best/config.json .*settings .*got \[1\]"),
        ({"settings": SETTINGS | {"alpha": "0.3"}}, "best/config.json .*alpha='0.3'"),
        ({"settings": SETTINGS | {"temperature": None}}, "best/config.json .*temperature=None"),
        ({"settings": SETTINGS | {"hint": ["map"]}}, r"best/config.json .*hint=\['map'\]"),
        ({"settings": SETTINGS | {"t_squared": 1}}, "best/config.json .*t_squared=1"),
        ({"settings": SETTINGS | {"memory_share": "1"}}, "best/config.json .*memory_share='1'"),
        ({"settings": SETTINGS | {"alpha": 2}}, r"best/config.json: .*alpha .*\[0, 1\], got 2"),
        ({"settings": SETTINGS | {"method": "kd"}}, "best/config.json: .*method .*dsn, self-distill, dks, got 'kd'"),
        ({"frozen": True}, "run .*frozen backbone.* no gradients"),
    ],
)
def test_settings_that_tell_no_loss(metrics, message, call, folder):
    save_metrics(folder / "run/best", metrics)
    code, _, err = call("gradients", "run", "--data", "data")
    save_metrics(folder / "run/best", {"settings": SETTINGS})
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(message, err), err


def test_separability(call, folder):
    code, out, _ = call("separability", "run", "--data", "data", "--classes", "1", "9", "--output", "out")
    assert code == 0
    assert "features of 80 images of 10 classes" in out
    assert out.endswith("wrote out/separability.json, out/separability.png\n")
    exits = written(folder, "separability")["run"]["exits"]
    assert [row["module"] for row in exits] == ["layer2", "layer4"]
    assert all(row["ratio"] == pytest.approx(row["sse"] / row["ssb"]) for row in exits)


def test_agreement(call, folder):
    code, out, _ = call("agreement", "run", "--data", "data", "--output", "out")
    assert code == 0
    assert "exits on 80 images" in out
    assert out.endswith("wrote out/agreement.json, out/agreement.png\n")
    report = written(folder, "agreement")["run"]
    assert report["exits"] == ["layer2", "layer4"]
    assert report["same_answer"][0][0] == 1
    assert len(report["overthought"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flat-minima", "--data", "data"], "required: model"),
        (["flat-minima", "plain"], "plain/best .*images of its run; give --data-dir"),
        (["flat-minima", "plain", "--data", "data", "--levels", "-1"], r"levels .*above 0, got \[-1.0\]"),
        (["flat-minima", "plain", "--data", "data", "--draws", "0"], "draws .* 1, got 0"),
        (["flat-minima", "plain", "nowhere", "--data", "data"], "nowhere .*no folder here"),
        (["flat-minima", "plain", "--data", "data", "-b", "0"], "--batch-size: .* 1, got 0"),
        (["flat-minima", "plain", "--data", "data", "-j", "-1"], "--workers: .* 0, got -1"),
        (["flat-minima", "plain", "--data", "data", "--device", "foo"], "--device: foo .*try --device cpu"),
        (["flat-minima", "plain", "--data", "data", "--device", "cuda:99"], "--device: cuda:99 .*try --device cpu"),
        (["gradients", "other", "--data", "data"], "3 classes, but data has 10 "),
        (["gradients", "frozen", "--data", "data"], "error: frozen .*frozen backbone.* no gradients"),
        (["gradients", "run", "--data", "data", "--checkpoints"], "run .*checkpoints/; .*--output"),
        (["gradients", "run", "--data", "nowhere"], "nowhere .*folder or file"),
        (["separability", "plain", "--data", "data"], "separability .*SelfDistillModel, got ResNet.*wrap_self_distill"),
        (["separability", "run", "--data", "data", "--classes", "10"], r"classes .*0 to 9, got \[10\]"),
        (["agreement", "plain", "--data", "data"], "agreement .*SelfDistillModel, got ResNet.*wrap_self_distill"),
        (["agreement", "short", "--data", "data"], "TruncatedModel, which has one exit only"),
        (["agreement", "run", "--data", "data", "--split", "nope"], "has no split 'nope'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, call):
    code, _, err = call(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flat-minima", "plain", "other"], "3 classes, but data has 10 "),
        (["gradients", "plain", "other"], "3 classes, but data has 10 "),
        (["gradients", "plain", "frozen"], "error: frozen .*frozen backbone.* no gradients"),
        (["gradients", "plain", "run", "--checkpoints"], "plain .*checkpoints/; .*--output"),
        (["flat-minima", "plain", "--output", "afile"], "afile .*file; .*--output .*folder"),
        (["agreement", "run", "--output", "afile/folder"], "afile .*file; .*--output .*folder"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_measured(arguments, message, call, monkeypatch):
    def measure(*_, **__):
        pytest.fail("measured")

    for name in ("measure_flatness", "measure_gradients", "measure_agreement"):
        monkeypatch.setattr(analysis, name, measure)
    code, _, err = call(*arguments, "--data", "data")
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(message, err), err


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfDistillTask(small_model()),
        lambda: FitNetTask(small_backbone(), small_backbone()),
        lambda: MutualLearningTask(small_backbone(), small_backbone()),
    ],
    ids=["self-distill", "fitnet", "dml"],
)
def test_checkpoints_hold_the_network_whatever_learns_beside_it(make, tmp_path):
    checkpoints, states = Checkpoints(tmp_path / "checkpoints", keep=2), []
    for step in (3, 7):
        task = make()
        states.append(task.get_eval_model().state_dict())
        weights = {name: value.clone() for name, value in learned_state(task).items()}
        checkpoints.write(Snapshot(weights, {}), step)
    checkpoints.wait()
    model = make().get_eval_model()
    loaded = load_checkpoints(model, tmp_path)
    for step, state in zip((3, 7), states, strict=True):
        assert next(loaded) == step
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    (tmp_path / "checkpoints/step-00000007/run.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-00000007/run\.pt .*damaged.*remove .*step-00000007$"):
        load_checkpoints(model, tmp_path)


@pytest.mark.slow
def test_gradients_over_training(call, folder, fashion_tensors):
    """At every checkpoint of a run: the weights of the last are those of the model itself."""
    train, val = fashion_tensors
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    model_data_config(backbone, 32, 1)
    config = TrainConfig(output=str(folder / "trained"), epochs=3, batch_size=50, workers=0, lr=0.02)
    task = SelfDistillTask(wrap_self_distill(backbone))
    Trainer(task, Subset(train, range(100)), Subset(val, range(20)), config).fit()
    code, out, _ = call("gradients", "trained", "--data", "data", "--checkpoints", "--output", "out")
    assert code == 0
    assert "trained, 6 updates" in out
    history = written(folder, "gradient_history")["trained"]
    assert [report["updates"] for report in history] == [2, 4, 6]
    assert {report["criterion"] for report in history} == {repr(SelfDistillLoss())}
    assert len({report["loss"] for report in history}) == 3
    call("gradients", str(folder / "trained/last"), "--data", "data", "--output", "out")
    (last,) = written(folder, "gradients").values()
    assert history[-1]["gradients"] == pytest.approx(last["gradients"], rel=1e-4)
