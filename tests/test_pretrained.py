"""Real ImageNet weights, and photographs that packages ship."""

import copy
import json
import re

import pytest
import skimage
import sklearn.datasets
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_selfdistill import SelfDistillModel, load_images, wrap_self_distill

from .conftest import EMBEDDED, ROOT, run_python


@pytest.fixture(scope="session")
def lite0(tmp_path_factory):
    """EfficientNet-Lite0 with its ImageNet weights, as timm reads them."""
    folder = tmp_path_factory.mktemp("pretrained") / "lite0"
    run_python(ROOT / "examples/efficientnet_lite0.py", folder)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    images = {
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "temple": sklearn.datasets.load_sample_image("china.jpg"),
        "flower": sklearn.datasets.load_sample_image("flower.jpg"),
    }
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("photograph", "expected"),
    [("cat", "tiger cat"), ("coffee", "espresso"), ("temple", "palace"), ("flower", "daisy")],
)
def test_photographs_are_recognised(photograph, expected, lite0, photographs):
    done = run_python(ROOT / "examples/predict.py", photographs / f"{photograph}.png", "--model", f"local-dir:{lite0}")
    assert done.stdout.splitlines()[0].split("  ")[-1] == expected


def test_wrapping_changes_no_tensor_of_the_backbone(lite0):
    backbone = timm.create_model(f"local-dir:{lite0}", pretrained=True)
    before = copy.deepcopy(backbone.state_dict())
    model = wrap_self_distill(backbone)
    assert model.backbone.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


@pytest.mark.slow
def test_fine_tuning_keeps_the_preprocessing_of_the_weights(lite0, tmp_path):
    images = load_images(EMBEDDED)
    images.train.select(range(300)).to_parquet(tmp_path / "images/train.parquet")
    images.val.select(range(200)).to_parquet(tmp_path / "images/test.parquet")
    run_python(
        ROOT / "examples/train.py",
        "--model",
        f"local-dir:{lite0}",
        "--pretrained",
        "--data-dir",
        tmp_path / "images",
        "--in-chans",
        3,
        "--img-size",
        32,
        "--epochs",
        2,
        "--head-warmup-epochs",
        1,
        "--layer-decay",
        0.75,
        "-b",
        50,
        "-j",
        0,
        "--output",
        tmp_path,
    )
    config = json.loads((tmp_path / "best/config.json").read_text())
    assert config["architecture"] == "tf_efficientnet_lite0"
    assert config["pretrained_cfg"]["mean"] == config["pretrained_cfg"]["std"] == [0.5, 0.5, 0.5]
    assert config["pretrained_cfg"]["interpolation"] == "bicubic"


@pytest.fixture(scope="session")
def fine_tuned(lite0, few_images, tmp_path_factory):
    """The plain network for ten classes, and what the run said."""
    output = tmp_path_factory.mktemp("runs") / "plain"
    done = run_python(
        ROOT / "examples/train.py",
        "--baseline",
        "--model",
        f"local-dir:{lite0}",
        "--pretrained",
        "--data-dir",
        few_images,
        "--in-chans",
        3,
        "--img-size",
        32,
        "--epochs",
        1,
        "-b",
        50,
        "-j",
        0,
        "--opt",
        "adamw",
        "--lr",
        1e-3,
        "--warmup-epochs",
        0,
        "--output",
        output,
    )
    return output / "best", done


def backbone_weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_fine_tuned_network_gets_exits_and_stays_as_it_is(fine_tuned, few_images, tmp_path):
    done = run_python(
        ROOT / "examples/train.py",
        "--model",
        f"local-dir:{fine_tuned[0]}",
        "--pretrained",
        "--freeze-backbone",
        "--data-dir",
        few_images,
        "--in-chans",
        3,
        "--epochs",
        2,
        "-b",
        50,
        "-j",
        0,
        "--no-aug",
        "--cache-features",
        "--unlabelled",
        "--output",
        tmp_path,
    )
    assert done.stderr == ""
    before, after = backbone_weights(fine_tuned[0]), backbone_weights(tmp_path / "best")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    config = json.loads((tmp_path / "best/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]  # that of the fine-tuning
    model = SelfDistillModel.from_pretrained(tmp_path / "best")
    assert model.exits == ("blocks.1", "blocks.2", "blocks.4", "blocks.6")


def test_a_classifier_that_is_new_has_nothing_to_teach(lite0, few_images, tmp_path):
    done = run_python(
        ROOT / "examples/train.py",
        "--model",
        f"local-dir:{lite0}",
        "--pretrained",
        "--freeze-backbone",
        "--data-dir",
        few_images,
        "--in-chans",
        3,
        "--img-size",
        32,
        "--epochs",
        1,
        "-b",
        100,
        "-j",
        0,
        "--output",
        tmp_path,
    )
    assert re.match("warning: .*frozen backbone.* untrained .* 10 classes", done.stderr)


def test_exits_for_a_network_from_images_alone(lite0, few_images, tmp_path):
    (tmp_path / "images").mkdir()
    for index, row in enumerate(load_images(few_images).train.select(range(100))):
        row["image"].save(tmp_path / f"images/{index}.png")
    done = run_python(
        ROOT / "examples/add_exits.py",
        tmp_path / "images",
        "--model",
        f"local-dir:{lite0}",
        "--img-size",
        32,
        "--epochs",
        2,
        "--output",
        tmp_path / "run",
    )
    assert re.search("without labels.* deepest", done.stdout)
    before, after = backbone_weights(lite0), backbone_weights(tmp_path / "run/best")
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    config = json.loads((tmp_path / "run/best/config.json").read_text())
    assert config["label_names"][281] == "tabby, tabby cat"
    assert config["self_distill"]["metrics"]["reference"] == "deepest"
