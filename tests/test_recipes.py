"""Every recipe is built, and trains two steps on images of the size, columns and number of classes of its data set."""

import json
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_selfdistill import SelfDistillLoss, model_data_config
from timm_selfdistill.cli import parse_args, train_config, train_parser
from timm_selfdistill.cli.methods import check_method_flags, create_task
from timm_selfdistill.cli.recipes import FOLDER, print_recipes
from timm_selfdistill.cli.train import _augmentation, _create_backbone
from timm_selfdistill.training.data.transforms import create_train_transform
from timm_selfdistill.training.loop.optimizer import base_lr, create_optimizer

from .conftest import run_python

RECIPES = sorted(FOLDER.glob("*.yaml"))
PAPER = {
    "cifar100": {
        "resnet18",
        "resnet50",
        "resnet101",
        "resnet152",
        "vgg19_bn",
        "resnext29_8x64d",
        "wide_resnet20_8",
        "wide_resnet44_8",
        "wide_resnet28_12",
        "pyramidnet101_240",
    },
    "imagenet": {"vgg19_bn", "resnet18", "resnet50"},
}
PUBLISHED = {
    "imagenet_resnet50_a1": (2048, 5e-3),
    "imagenet_resnet50_a2": (2048, 5e-3),
    "imagenet_resnet50_a3": (2048, 8e-3),
    "imagenet_efficientnet_b0": (768, 0.048),
    "imagenet_mobilenetv4_conv_medium": (4096, 4e-3),
    "imagenet_convnext_tiny": (4096, 4e-3),
    "imagenet_deit3_small": (2048, 4e-3),
    "finetune_vit_base_mae": (1024, 2e-3),
}
"""Recipes of other papers, and of timm: images of an update and learning rate."""
OWN_IMAGES = "own images"
SHAPES = {
    "uoft-cs/cifar100": ("img", "fine_label", 100, 32),
    "ILSVRC/imagenet-1k": ("image", "label", 1000, 300),
    OWN_IMAGES: ("image", "label", 5, 300),
}


def images_like(name: str, count: int) -> datasets.Dataset:
    image, label, classes, size = SHAPES[name]
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    columns = {image: [Image.fromarray(array) for array in pixels], label: [i % classes for i in range(count)]}
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])}
    if name == "uoft-cs/cifar100":
        columns["coarse_label"] = [0] * count
        features["coarse_label"] = datasets.ClassLabel(num_classes=20)
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def test_there_is_a_recipe_for_every_network_of_the_paper():
    names = {f"{data}_{name}" for data, names in PAPER.items() for name in names}
    assert {path.stem for path in RECIPES} == names | PUBLISHED.keys()


def test_the_recipes_for_cifar_have_the_hyperparameters_of_the_authors_code():
    expected = {
        "dataset": "uoft-cs/cifar100",
        "train-crop-mode": "pad",
        "hflip": 0.5,
        "aa": "cifar10",
        "cutout": 16,
        "epochs": 250,
        "batch-size": 128,
        "opt": "momentum",
        "lr": 0.1,
        "momentum": 0.9,
        "weight-decay": 5e-4,
        "sched": "multistep",
        "decay-milestones": [250 // 3, 250 * 2 // 3, 250 - 10],
        "decay-rate": 0.1,
        "warmup-epochs": 0,
        "temperature": 3,
        "alpha": 0.3,
        "beta": 0.03,
    }
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text())
        if path.stem.startswith("cifar100"):
            assert {key: recipe[key] for key in expected} == expected
            assert recipe["model"] == path.stem.replace("cifar100", "cifar")


def test_the_recipes_for_imagenet_are_the_baseline_of_90_epochs():
    expected = {
        "dataset": "ILSVRC/imagenet-1k",
        "img-size": 224,
        "scale": [0.08, 1.0],
        "crop-pct": 0.875,
        "epochs": 90,
        "batch-size": 256,
        "opt": "momentum",
        "momentum": 0.9,
        "weight-decay": 1e-4,
        "sched": "step",
        "decay-epochs": 30,
        "decay-rate": 0.1,
        "warmup-epochs": 0,
    }
    for name, lr in (("resnet18", 0.1), ("resnet50", 0.1), ("vgg19_bn", 0.01)):
        recipe = yaml.safe_load((FOLDER / f"imagenet_{name}.yaml").read_text())
        assert {key: recipe[key] for key in expected} == expected
        assert (recipe["model"], recipe["lr"]) == (name, lr)


QUICK = {"cifar100_resnet18"}
SMALL = ["--img-size", 64, "--warmup-epochs", 0, "--grad-accum-steps", 1, "--no-pretrained"]
"""Flags that replace those of a published recipe, so that its own network is updated twice in seconds on a CPU."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_built(path):
    """Network, loss, optimizer, schedule and transform, without memory for the weights."""
    args = parse_args(train_parser("", "images"), ["--config", str(path), "--no-pretrained"])
    check_method_flags(args)
    config = train_config(args)
    with torch.device("meta"):
        backbone = _create_backbone(args, SimpleNamespace(num_classes=SHAPES[args.dataset or OWN_IMAGES][2]))
        data_config = model_data_config(
            backbone, args.img_size, interpolation=args.interpolation, crop_pct=args.crop_pct
        )
        task = create_task(args, backbone, lambda: None)
    assert len(task.trainable_module.exits) == 4
    expected = SelfDistillLoss() if path.stem in PUBLISHED else SelfDistillLoss.paper()
    names = ("temperature", "alpha", "beta", "hint", "teacher", "t_squared")
    assert {name: getattr(task.criterion, name) for name in names} == {name: getattr(expected, name) for name in names}
    assert task.criterion.distill == ("sigmoid" if args.bce_loss else "softmax")
    config.lr = base_lr(config, 1024) if config.lr_base else config.lr
    optimizer = create_optimizer(task.trainable_module, config)
    schedule, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=10)
    schedule.step_update(10 * config.epochs // 2)
    assert all(group["lr"] > 0 for group in optimizer.param_groups)
    transform = create_train_transform(
        {**data_config, "interpolation": args.train_interpolation}, **_augmentation(args)
    )
    image = Image.fromarray(np.zeros((300, 200, 3), dtype=np.uint8))
    assert transform(image).shape == data_config["input_size"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_batch_and_the_learning_rate_of_its_source(name):
    path = FOLDER / f"{name}.yaml"
    text = path.read_text()
    images, lr = PUBLISHED[name]
    config = train_config(parse_args(train_parser("", "images"), ["--config", str(path)]))
    update = config.batch_size * config.grad_accum_steps
    assert images % update == 0
    assert f"{images} images per update: {images // update} processes with batch-size {config.batch_size}" in text
    assert math.isclose(base_lr(config, images), lr)
    assert "# Source: " in text
    assert "# Self distillation: " in text


def test_layer_decay_leaves_new_classifiers_at_the_full_learning_rate():
    path = FOLDER / "finetune_vit_base_mae.yaml"
    args = parse_args(train_parser("", "images"), ["--config", str(path), "--no-pretrained"])
    with torch.device("meta"):
        task = create_task(args, _create_backbone(args, SimpleNamespace(num_classes=5)), lambda: None)
    model = task.trainable_module
    scales = {
        id(p): group["lr_scale"]
        for group in create_optimizer(model, train_config(args)).param_groups
        for p in group["params"]
    }
    assert {scales[id(p)] for p in (*model.heads.parameters(), *model.backbone.head.parameters())} == {1}
    assert scales[id(model.backbone.blocks[11].mlp.fc2.weight)] == pytest.approx(0.65)
    assert scales[id(model.backbone.patch_embed.proj.weight)] == pytest.approx(0.65**13)


def test_the_list_of_recipes_says_what_each_trains(capsys):
    print_recipes()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [path.stem for path in RECIPES]
    assert all(" on " in line for line in lines)


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES]
)
def test_a_recipe_trains_two_steps(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    data = recipe.get("dataset", OWN_IMAGES)
    images_like(data, 4).to_parquet(tmp_path / "train.parquet")
    images_like(data, 2).to_parquet(tmp_path / "test.parquet")
    columns = [flag for key in ("input-key", "target-key") if key in recipe for flag in (f"--{key}", recipe[key])]
    smaller = SMALL if path.stem in PUBLISHED else ()
    run_python(
        "examples/train.py",
        "--config",
        path,
        "--data-dir",
        tmp_path,
        *columns,
        "--output",
        tmp_path / "run",
        "--epochs",
        1,
        "-b",
        2,
        "-j",
        0,
        *smaller,
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [row["exit"] for row in summary["exits"]] == [0, 1, 2, 3, "ensemble"]
    assert summary["model"] == recipe["model"].removesuffix(".mae")
    size = 64 if path.stem in PUBLISHED else 32 if "cifar" in path.stem else 224
    assert summary["input_size"] == [3, size, size]
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    shares = [row["share"] for row in summary["exits"]]
    assert shares == sorted(shares)
    assert shares[2] < 0.95
