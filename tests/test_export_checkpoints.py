"""Saved models of checkpoints, and timm's functions for checkpoints on what a run leaves."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import clean_state_dict, load_state_dict

from timm_selfdistill import SelfDistillModel

from .conftest import run_python, small_backbone
from .training.test_trained_exits import TRAIN, same, saved, write_timm_checkpoint  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def run(few_images, folder):
    run_python(
        *TRAIN,
        "--model",
        "test_resnet",
        "--data-dir",
        few_images,
        "--model-ema",
        "--model-ema-decay",
        0.5,
        "--mean",
        0.3,
        "--epochs",
        2,
        "--output",
        folder / "run",
    )
    return folder / "run"


def check_readers(folder, state):
    assert same(SelfDistillModel.from_pretrained(folder), state)
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in backbone.state_dict().items())


def test_a_checkpoint_becomes_a_saved_model(run, call, folder):
    checkpoints = sorted((run / "checkpoints").iterdir())
    code, said, errors = call("export", "--format", "timm", checkpoints[-1], "--output", "model")
    assert (code, errors) == (0, "")
    assert f"using the moving average in {checkpoints[-1]}" in said
    check_readers(folder / "model", SelfDistillModel.from_pretrained(run / "last").state_dict())
    config, last = (json.loads((path / "config.json").read_text()) for path in (folder / "model", run / "last"))
    assert config["label_names"] == last["label_names"]
    assert config["pretrained_cfg"]["mean"] == [0.3] == last["pretrained_cfg"]["mean"]
    metrics = config["self_distill"]["metrics"]
    assert all(row.keys() == {"exit", "module", "params", "macs", "share", "speedup"} for row in metrics["exits"])
    assert "epoch" not in metrics
    assert metrics["settings"] == last["self_distill"]["metrics"]["settings"]
    assert "Top-1 accuracy" not in (folder / "model/README.md").read_text()

    assert call("export", "--format", "timm", run, "--output", "of_run")[0] == 0
    check_readers(folder / "of_run", SelfDistillModel.from_pretrained(run / "best").state_dict())
    config, best = (json.loads((path / "config.json").read_text()) for path in (folder / "of_run", run / "best"))
    assert config["self_distill"]["metrics"] == best["self_distill"]["metrics"]


def test_averaged_checkpoints_become_a_saved_model(run, call, folder):
    """What timm's avg_checkpoints.py and clean_checkpoint.py do with files, by the functions that they call."""
    states = [load_state_dict(str(path / "model.safetensors")) for path in (run / "checkpoints").iterdir()]
    mean = {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}
    save_file(clean_state_dict(mean), run / "averaged.safetensors")
    assert call("export", "--format", "timm", run / "averaged.safetensors", "--output", "averaged")[0] == 0
    prefix = "trainable_module_ema.module."
    expected = {name.removeprefix(prefix): value for name, value in mean.items() if name.startswith(prefix)}
    model = SelfDistillModel.from_pretrained(folder / "averaged")
    assert all(torch.equal(value, expected[name].to(value)) for name, value in model.state_dict().items())
    shutil.copy(run / "averaged.safetensors", folder / "alone.safetensors")
    code, _, errors = call("export", "--format", "timm", "alone.safetensors", "--output", "alone")
    assert code == 2
    assert "does not record its network; give the timm model with --model" in errors
    code, said, _ = call(
        "export", "--format", "timm", "alone.safetensors", "--model", "test_resnet", "--output", "alone"
    )
    assert code == 0
    assert "assumed to belong to layer1, layer2, layer3" in said
    assert same(SelfDistillModel.from_pretrained(folder / "alone"), model.state_dict())


def test_a_checkpoint_of_timms_training_script(saved, call, folder):  # noqa: F811
    model = SelfDistillModel.from_pretrained(saved)
    path, _ = write_timm_checkpoint(folder / "timm", model)
    assert call("export", "--format", "timm", path, "--output", "from_timm")[0] == 0
    check_readers(folder / "from_timm", model.state_dict())
    config = json.loads((folder / "from_timm/config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.25] * 3
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 96]
    code, _, errors = call("export", "--format", "timm", path, "--model", "resnet18", "--output", "wrong")
    assert code == 2
    assert "is a checkpoint of test_resnet, not resnet18" in errors


def test_a_plain_checkpoint(call, folder):
    model = small_backbone(num_classes=7, in_chans=1)
    torch.save({"state_dict": model.state_dict(), "arch": "test_resnet"}, folder / "plain.pth.tar")
    code, said, _ = call("export", "--format", "timm", "plain.pth.tar", "--output", "plain")
    assert code == 0
    assert "does not record its preprocessing; using that of test_resnet" in said
    assert same(timm.create_model("local-dir:" + str(folder / "plain"), pretrained=True), model.state_dict())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "timm", "--staged"], "--staged is for --format onnx"),
        (["--format", "timm", "--exit", 0], "--exit 0 is for --format onnx"),
        (["--format", "timm", "--model", "test_resnet"], "is a saved model, which records its network; leave --model"),
        (["--model", "test_resnet"], "--model test_resnet is for --format timm"),
    ],
)
def test_flags_that_contradict(flags, message, saved, call, folder):  # noqa: F811
    code, _, errors = call("export", saved, *flags, "--output", "no")
    assert code == 2
    assert message in errors
    assert not (folder / "no").exists()


def test_heads_without_a_record_of_their_exits(saved, call, folder):  # noqa: F811
    torch.save(SelfDistillModel.from_pretrained(saved).state_dict(), folder / "two.pth")
    code, _, errors = call("export", "--format", "timm", "two.pth", "--model", "test_resnet", "--output", "two")
    assert code == 2
    assert "two.pth has 2 heads but does not record where they belong, and test_resnet has 3 by default" in errors
