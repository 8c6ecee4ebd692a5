"""Networks that users have already."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.task import ClassificationTask

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, model_data_config
from timm_selfdistill.training.loop.initial_weights import create_backbone

from ..conftest import ROOT, run_python, small_backbone, small_model


@pytest.fixture
def trained():
    """A network with 12 classes whose weights are its own."""
    torch.manual_seed(7)
    return small_backbone(num_classes=12, in_chans=1)


def write(folder, state, suffix: str):
    path = folder / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path


def test_a_checkpoint_gives_every_tensor(trained, tmp_path):
    state = trained.state_dict()
    average = {key: value + 1 for key, value in state.items()}
    cases = {
        ".safetensors": (state, 0),
        ".pth": (state, 0),
        ".pt": ({"state_dict": state}, 0),
        ".pth.tar": (
            {
                "state_dict": {f"module.{key}": value for key, value in state.items()},
                "epoch": 3,
                "args": argparse.Namespace(lr=0.1),
            },
            0,
        ),
        ".tar": ({"state_dict": state, "state_dict_ema": average}, 1),
    }
    for suffix, (content, added) in cases.items():
        path = write(tmp_path, content, suffix)
        model = create_backbone("test_resnet", initial_checkpoint=str(path), num_classes=12, in_chans=1)
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key] + added), (suffix, key)


def test_a_checkpoint_as_pretrained_weights_gives_all_but_the_classifier(trained, tmp_path):
    path = write(tmp_path, trained.state_dict(), ".pth")
    model = create_backbone("test_resnet", pretrained_path=str(path), num_classes=10, in_chans=1)
    assert model.fc.weight.shape[0] == 10
    assert all(
        torch.equal(value, trained.state_dict()[key])
        for key, value in model.state_dict().items()
        if not key.startswith("fc.")
    )
    with pytest.raises(ValueError, match=rf"{path} .*ConvNeXt: .*stem\.0\.weight is missing.*--model, "):
        create_backbone("test_convnext", pretrained_path=str(path), num_classes=10, in_chans=1)
    with pytest.raises(ValueError, match=r"conv1\.0\.weight \(\d+, 1, 3, 3\) instead of \(\d+, 3, 3, 3\).*--in-chans"):
        create_backbone("test_resnet", pretrained_path=str(path), num_classes=10)
    with pytest.raises(ValueError, match="initial_checkpoint .*pretrained_path .*give only one"):
        create_backbone("test_resnet", pretrained_path=str(path), initial_checkpoint=str(path))


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        (
            "test_resnet",
            10,
            r"ResNet: fc\.weight \(12, 96\) instead of \(10, 96\), fc\.bias \(12,\) instead of \(10,\); "
            ".*12 classes.* 10: --num-classes 12 .*--pretrained-path instead of --initial-checkpoint",
        ),
        ("test_convnext", 12, r"ConvNeXt: .*stem\.0\.weight is missing.* \d+ more; .*--model, .*--num-classes"),
    ],
)
def test_a_checkpoint_of_another_network(name, classes, message, trained, tmp_path):
    path = write(tmp_path, trained.state_dict(), ".safetensors")
    with pytest.raises(ValueError, match=message):
        create_backbone(name, initial_checkpoint=str(path), num_classes=classes, in_chans=1)


def test_what_is_no_checkpoint(tmp_path, trained):
    def create(path):
        create_backbone("test_resnet", initial_checkpoint=str(path), num_classes=12, in_chans=1)

    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/missing\.pth is neither a file .*\.safetensors or \.pth"):
        create(tmp_path / "missing.pth")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is neither a file nor a folder with model\.safetens"):
        create(tmp_path)
    whole = write(tmp_path, trained.state_dict(), ".safetensors").read_bytes()
    torch.save(trained.state_dict(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "legacy.pth").read_bytes()
    broken = {
        "junk.pth": b"junk",
        "legacy.pth": legacy[:29],
        "cut.safetensors": whole[:5000],
        "empty.pth": b"",
        "text.pth": b"hello",
        "cut.pth": whole[:99],
        "empty.safetensors": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name} \(.+\); .*\.safetensors, .*weights_only=True"):
            create(tmp_path / name)
    torch.save(trained, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match=rf"{tmp_path}/pickled\.pth \(.+\); .*\.safetensors, .*weights_only=True"):
        create(tmp_path / "pickled.pth")
    weights = torch.zeros(3)
    for name, content in {
        "numbers": {"lr": 0.1},
        "list": [weights],
        "tensor": weights,
        "text": {"state_dict": "x"},
        "none": {"model": None},
        "keys": {1: weights},
    }.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name}\.pth .*(state dict |weights_only=True)"):
            create(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, fashion_tensors, tmp_path):
    model, plain = small_model(in_chans=1), small_backbone(in_chans=1)
    for backbone in (model.backbone, plain):
        backbone.layer1[0].bn1.running_var[3] = value
    for task in (SelfDistillTask(model), ClassificationTask(plain, verbose=False)):
        with pytest.raises(ValueError, match=r"model.* weights .*not finite .*layer1\.0\.bn1\.running_var"):
            Trainer(task, *fashion_tensors, TrainConfig(output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_network_of_more_classes_than_the_images_get_its_exits(trained, few_images, tmp_path):
    path = write(tmp_path, trained.state_dict(), ".safetensors")
    command = [
        ROOT / "examples/train.py",
        "--model",
        "test_resnet",
        "--initial-checkpoint",
        path,
        "--data-dir",
        few_images,
        "--epochs",
        1,
        "-b",
        50,
        "-j",
        0,
        "--freeze-backbone",
        "--no-aug",
        "--in-chans",
        1,
        "--output",
        tmp_path / "run",
    ]
    refused = run_python(*command, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--num-classes 12 " in refused.stderr
    assert "--pretrained-path" in refused.stderr
    run_python(*command, "--num-classes", 12)
    saved = timm.create_model(f"local-dir:{tmp_path / 'run/best'}", pretrained=True)
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in saved.state_dict().items())


def test_preprocessing_goes_along_with_the_weights(tmp_path):
    model = small_model(num_classes=12)
    known = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.7}
    model_data_config(model, 32, **known)
    model.save_pretrained(tmp_path)
    for how in ("initial_checkpoint", "pretrained_path"):
        config = create_backbone("test_resnet", num_classes=12, **{how: str(tmp_path)}).pretrained_cfg
        assert {key: tuple(config[key]) if key in ("mean", "std") else config[key] for key in known} == known
        assert config["input_size"] == (3, 160, 160)
