"""A model has the same names in every command, and a recipe is found by its own."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from timm_selfdistill import __version__
from timm_selfdistill.cli.recipes import FOLDER, find_recipe
from timm_selfdistill.cli.saved import saved_model, timm_name
from timm_selfdistill.hub import save_timm_model

from .conftest import run_python, small_backbone


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run directory, and a folder with the name of an architecture."""
    for name in ("runs/first/best", "runs/first/last", "resnet18"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "saved", "timms"),
    [
        ("runs/first", "runs/first/best", "local-dir:runs/first/best"),
        ("runs/first/", "runs/first/best", "local-dir:runs/first/best"),
        ("runs/first/last", "runs/first/last", "local-dir:runs/first/last"),
        ("local-dir:runs/first", "runs/first/best", "local-dir:runs/first/best"),
        ("local-dir:runs/first/last", "runs/first/last", "local-dir:runs/first/last"),
        ("local-dir:nowhere", "nowhere", "local-dir:nowhere"),
        ("user/name", "user/name", "hf-hub:user/name"),
        ("hf-hub:user/name", "user/name", "hf-hub:user/name"),
        ("hf-hub:user/name@v1", "user/name@v1", "hf-hub:user/name@v1"),
        ("resnet50", "resnet50", "resnet50"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("resnet18", "resnet18", "resnet18"),
        ("./resnet18", "./resnet18", "local-dir:./resnet18"),
        ("no_such_network", "no_such_network", "no_such_network"),
    ],
)
def test_models(name, saved, timms, folder):
    assert saved_model(name) == saved
    assert timm_name(name) == timms
    assert timm_name(str(folder / "runs/first")) == f"local-dir:{folder}/runs/first/best"


def test_recipes_by_name_and_files_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("cifar100_resnet18") == FOLDER / "cifar100_resnet18.yaml"
    Path("cifar100_resnet18").write_text("lr: 0.1")
    assert find_recipe("cifar100_resnet18") == Path("cifar100_resnet18")
    for name, hint in (
        ("cifar_resnet18", "did you mean the recipe cifar100_resnet18"),
        ("x.yaml", "recipes lists"),
        ("../secret", "recipes lists"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist; --config takes a YAML file .*{hint}"):
            find_recipe(name)


@pytest.mark.slow
def test_the_module_is_the_command(few_images, tmp_path):
    """From a folder with nothing in it; with the files of a run, by its directory's name."""
    save_timm_model(small_backbone(), tmp_path / "runs/first/best")
    flags = ["-b", 32, "-j", 0, "--epochs", 1, "--lr", 0, "--warmup-epochs", 0, "--img-size", 32]
    done = run_python(
        "-m",
        "timm_selfdistill",
        "train",
        "--data-dir",
        few_images,
        "--model",
        "runs/first",
        "--pretrained",
        "--output",
        tmp_path / "run",
        *flags,
        cwd=tmp_path,
    )
    assert f"python -m timm_selfdistill train --data-dir {few_images} --model runs/first" in done.stdout
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("runs/first/best", "run/best"))
    assert (before["conv1.0.weight"] == after["conv1.0.weight"]).all()
    refused = run_python("-m", "timm_selfdistill", "train", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("timm-selfdistill: error: there are no images to train on: give --data-dir FOLDER")
    assert "cifar100_resnet18" in run_python("-m", "timm_selfdistill", "recipes", cwd=tmp_path).stdout
    assert __version__ in run_python("-m", "timm_selfdistill", "--version", cwd=tmp_path).stdout
