"""A network that has classes keeps their order, whatever that of the folders."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from timm_selfdistill import load_images, model_data_config, wrap_self_distill
from timm_selfdistill.training.data.splits import fit_classes

from ...conftest import ROOT, run_python, small_backbone
from .test_layouts import make


def network(names: list[str], num_classes: int | None = None):
    backbone = small_backbone(num_classes=num_classes or len(names))
    backbone.pretrained_cfg.update(label_names=names, num_classes=len(names))
    return backbone


@pytest.fixture
def animals(photos):
    make(photos, "train/{cat,dog,fish}/{1..4}.jpg val/{cat,dog,fish}/{5,6}.jpg")
    return load_images(photos)


def names_of(images, part: int) -> list[str]:
    """Of each image, by the class index that it is given."""
    data = images.transformed(model_data_config(small_backbone(), 32))[part]
    return [images.class_names[label] for _, label in data]


@pytest.mark.parametrize("kind", ["folder", "table", "stream"])
def test_the_networks_order(animals, kind):
    before = animals
    if kind != "folder":
        for split, rows in (("train", animals.train), ("test", animals.val)):
            rows.to_parquet(f"tables/{split}.parquet")
        before = load_images("tables", streaming=kind == "stream")
    after = fit_classes(before, network(["fish", "cat", "dog"]), frozen=False)
    assert after.class_names == ["fish", "cat", "dog"]
    for part in (0, 1):
        assert names_of(after, part) == names_of(before, part)
    again = after.in_order(["dog", "fish", "cat"])
    assert names_of(again, 1) == names_of(before, 1)
    more = before.in_order(["bird", "dog", "cat", "fish"])
    assert names_of(more, 0) == names_of(before, 0)


def test_other_classes_are_refused(animals):
    with pytest.raises(
        ValueError,
        match=(
            r"3 classes \('fish', 'cat', 'cow'\), .*3 classes \('cat', 'dog', 'fish'\): .*'dog'; .*--pretrained-path"
        ),
    ):
        fit_classes(animals, network(["fish", "cat", "cow"]), frozen=False)
    with pytest.raises(ValueError, match="'fish', 'cat', 'cow'.*--unlabelled"):
        fit_classes(animals, network(["fish", "cat", "cow"]), frozen=True)


def test_a_new_classifier_and_one_without_names_take_the_images_order(animals):
    assert fit_classes(animals, network(["a", "b"], num_classes=3), frozen=False) is animals
    plain = small_backbone(num_classes=3)
    plain.pretrained_cfg["num_classes"] = 3
    assert fit_classes(animals, plain, frozen=False) is animals
    with pytest.warns(UserWarning, match="new, untrained classifier"):
        fit_classes(animals, network(["a", "b"], num_classes=3), frozen=True)


def test_classes_whose_names_are_numbers(photos):
    """By name, not by index: a network may have them in the order of texts."""
    make(photos, "{0..10}/{1..3}.jpg")
    before = load_images(photos, val_fraction=0.4)
    after = fit_classes(before, network(sorted(map(str, range(11)))), frozen=False)
    assert after.class_names == ["0", "1", "10", *map(str, range(2, 10))]
    for part in (0, 1):
        assert names_of(after, part) == names_of(before, part)


def test_labels_that_are_numbers(photos):
    make(photos, "{0,1}/{1..20}.jpg")
    images = load_images(photos)
    with pytest.warns(UserWarning, match="labels are numbers; .*0 for 'cat', 1 for 'dog'"):
        assert fit_classes(images, network(["cat", "dog"]), frozen=False).class_names == ["cat", "dog"]


def test_a_saved_model_is_trained_on_and_measured_with_folders_in_another_order(animals, command):
    """The names of the folders are in natural order, those of the network are not."""
    backbone = network(["fish", "cat", "dog"])
    backbone.pretrained_cfg["input_size"] = (3, 32, 32)
    wrap_self_distill(backbone).save_pretrained("saved")
    flags = ["--data-dir", Path("photos").resolve(), "-b", 4, "-j", 0, "--epochs", 1, "--lr", 0]
    run_python(
        ROOT / "examples/train.py",
        *flags,
        "--model",
        f"local-dir:{Path('saved').resolve()}",
        "--pretrained",
        "--output",
        Path("run").resolve(),
    )
    assert load_file("run/best/model.safetensors").keys() == load_file("saved/model.safetensors").keys()
    val = animals.in_order(["fish", "cat", "dog"]).transformed(resolve_model_data_config(backbone))[1]
    with torch.no_grad():
        right = [int(backbone.eval()(image[None]).argmax()) == label for image, label in val]
    for model in ("saved", "run"):
        code, out, err = command("evaluate", model, "--data", "photos")
        assert (code, err) == (0, "")
        assert "val: 6 images of 3 classes in photos/val" in out
        if model == "saved":
            assert re.search(rf" 3 .*{100 * sum(right) / 6:.2f}", out)
    make(Path("other"), "train/{cow,cat,dog}/{1..4}.jpg val/{cow,cat,dog}/5.jpg")
    code, _, err = command("evaluate", "saved", "--data", "other")
    assert code == 2
    assert "'fish', 'cat', 'dog'" in err
    assert "does not know 'cow'" in err
