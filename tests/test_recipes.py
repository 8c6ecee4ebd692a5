"""Every recipe trains two steps as it is, on images of the size, columns and number of classes of its data set."""
import json

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from timm_selfdistill import SelfDistillLoss, wrap_self_distill
from timm_selfdistill.cli import parse_args, train_config, train_parser
from timm_selfdistill.cli.methods import exit_loss
from timm_selfdistill.cli.recipes import FOLDER

from .conftest import run_python

RECIPES = sorted(FOLDER.glob("*.yaml"))
PAPER = {
    "cifar100": {"resnet18", "resnet50", "resnet101", "resnet152", "vgg19_bn", "resnext29_8x64d", "wide_resnet20_8",
                 "wide_resnet44_8", "wide_resnet28_12", "pyramidnet101_240"},
    "imagenet": {"vgg19_bn", "resnet18", "resnet50"},
}
SHAPES = {"uoft-cs/cifar100": ("img", "fine_label", 100, 32), "ILSVRC/imagenet-1k": ("image", "label", 1000, 300)}


def images_like(name: str, count: int) -> datasets.Dataset:
    image, label, classes, size = SHAPES[name]
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    columns = {image: [Image.fromarray(array) for array in pixels], label: list(range(count))}
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])}
    if name == "uoft-cs/cifar100":
        columns["coarse_label"] = [0] * count
        features["coarse_label"] = datasets.ClassLabel(num_classes=20)
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def test_there_is_a_recipe_for_every_network_of_the_paper():
    assert {path.stem for path in RECIPES} == {f"{data}_{name}" for data, names in PAPER.items() for name in names}


def test_the_recipes_for_cifar_have_the_hyperparameters_of_the_authors_code():
    expected = {
        "dataset": "uoft-cs/cifar100", "train-crop-mode": "pad", "hflip": 0.5, "aa": "cifar10", "cutout": 16,
        "epochs": 250, "batch-size": 128, "opt": "momentum", "lr": 0.1, "momentum": 0.9, "weight-decay": 5e-4,
        "sched": "multistep", "decay-milestones": [250 // 3, 250 * 2 // 3, 250 - 10], "decay-rate": 0.1,
        "warmup-epochs": 0, "temperature": 3, "alpha": 0.3, "beta": 0.03,
    }
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text())
        if path.stem.startswith("cifar100"):
            assert {key: recipe[key] for key in expected} == expected
            assert recipe["model"] == path.stem.replace("cifar100", "cifar")


def test_the_recipes_for_imagenet_are_the_baseline_of_90_epochs():
    expected = {
        "dataset": "ILSVRC/imagenet-1k", "img-size": 224, "scale": [0.08, 1.0], "crop-pct": 0.875, "epochs": 90,
        "batch-size": 256, "opt": "momentum", "momentum": 0.9, "weight-decay": 1e-4, "sched": "step",
        "decay-epochs": 30, "decay-rate": 0.1, "warmup-epochs": 0,
    }
    for name, lr in (("resnet18", 0.1), ("resnet50", 0.1), ("vgg19_bn", 0.01)):
        recipe = yaml.safe_load((FOLDER / f"imagenet_{name}.yaml").read_text())
        assert {key: recipe[key] for key in expected} == expected
        assert (recipe["model"], recipe["lr"]) == (name, lr)


QUICK = {"cifar100_resnet18"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_a_network_and_flags_that_there_are(path):
    args = parse_args(train_parser("", "images"), ["--config", str(path)])
    train_config(args)
    with torch.device("meta"):
        model = wrap_self_distill(timm.create_model(args.model, num_classes=SHAPES[args.dataset][2]))
    assert len(model.exits) == 4
    assert repr(exit_loss(vars(args))) == repr(SelfDistillLoss.paper())


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES])
def test_a_recipe_trains_two_steps(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    images_like(recipe["dataset"], 4).to_parquet(tmp_path / "train.parquet")
    images_like(recipe["dataset"], 2).to_parquet(tmp_path / "test.parquet")
    columns = [flag for key in ("input-key", "target-key") if key in recipe for flag in (f"--{key}", recipe[key])]
    run_python("examples/train.py", "--config", path, "--data-dir", tmp_path, *columns, "--output", tmp_path / "run",
               "--epochs", 1, "-b", 2, "-j", 0)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [row["exit"] for row in summary["exits"]] == [0, 1, 2, 3, "ensemble"]
    assert summary["model"] == recipe["model"]
    assert summary["input_size"] == ([3, 32, 32] if "cifar" in path.stem else [3, 224, 224])
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    shares = [row["share"] for row in summary["exits"]]
    assert shares == sorted(shares)
    assert shares[2] < 0.95
