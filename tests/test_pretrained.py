"""Real ImageNet weights, and photographs that packages ship."""
import copy
import json

import pytest
import skimage
import sklearn.datasets
import timm
import torch
from PIL import Image

from timm_selfdistill import load_images, wrap_self_distill

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
    images = {"cat": skimage.data.chelsea(), "coffee": skimage.data.coffee(),
              "temple": sklearn.datasets.load_sample_image("china.jpg"),
              "flower": sklearn.datasets.load_sample_image("flower.jpg")}
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(("photograph", "expected"), [
    ("cat", "tiger cat"), ("coffee", "espresso"), ("temple", "palace"), ("flower", "daisy")])
def test_photographs_are_recognised(photograph, expected, lite0, photographs):
    done = run_python(ROOT / "examples/predict.py", photographs / f"{photograph}.png", "--model", f"local-dir:{lite0}")
    assert done.stdout.splitlines()[0].split("  ")[-1] == expected


def test_wrapping_changes_no_tensor_of_the_backbone(lite0):
    backbone = timm.create_model(f"local-dir:{lite0}", pretrained=True)
    before = copy.deepcopy(backbone.state_dict())
    model = wrap_self_distill(backbone)
    assert model.backbone.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


def test_fine_tuning_keeps_the_preprocessing_of_the_weights(lite0, tmp_path):
    images = load_images(EMBEDDED)
    images.train.select(range(300)).to_parquet(tmp_path / "images/train.parquet")
    images.val.select(range(200)).to_parquet(tmp_path / "images/test.parquet")
    run_python(ROOT / "examples/train.py", "--model", f"local-dir:{lite0}", "--pretrained", "--data-dir",
               tmp_path / "images", "--in-chans", 3, "--img-size", 32, "--epochs", 2, "--head-warmup-epochs", 1,
               "--layer-decay", 0.75, "-b", 50, "-j", 0, "--output", tmp_path)
    config = json.loads((tmp_path / "best/config.json").read_text())
    assert config["architecture"] == "tf_efficientnet_lite0"
    assert config["pretrained_cfg"]["mean"] == config["pretrained_cfg"]["std"] == [0.5, 0.5, 0.5]
    assert config["pretrained_cfg"]["interpolation"] == "bicubic"
