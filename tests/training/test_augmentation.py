import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import AutoAugment, RandomCrop, RandomHorizontalFlip

from timm_selfdistill.training.data.transforms import Cutout, create_train_transform

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.25,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def test_cutout_zeroes_a_square_that_a_border_may_cut_off():
    areas = []
    for _ in range(300):
        cut = Cutout(16)(torch.ones(3, 32, 32)) == 0
        assert torch.equal(cut[0], cut[1])
        rows, columns = cut[0].any(1).sum().item(), cut[0].any(0).sum().item()
        assert cut[0].sum().item() == rows * columns
        assert 1 <= min(rows, columns) <= max(rows, columns) <= 16
        areas.append(rows * columns)
    assert max(areas) == 256
    assert 8 * 8 <= min(areas) < 120


def test_cutout_leaves_its_input_alone():
    image = torch.ones(3, 8, 8)
    Cutout(4)(image)
    assert image.min() == 1


def test_the_cifar_recipe_is_crop_flip_policy_and_cutout_in_this_order():
    transform = create_train_transform(CONFIG, train_crop_mode="pad", auto_augment="cifar10", cutout=16)
    kinds = [type(step).__name__ for step in transform.transforms]
    assert kinds == [
        "Resize",
        "RandomCrop",
        "RandomHorizontalFlip",
        "AutoAugment",
        "MaybeToTensor",
        "Cutout",
        "Normalize",
    ]
    crop, flip, policy = transform.transforms[1:4]
    assert isinstance(crop, RandomCrop)
    assert (crop.size, crop.padding) == ((32, 32), (4, 4))
    assert isinstance(flip, RandomHorizontalFlip)
    assert isinstance(policy, AutoAugment)
    assert policy.policy.value == "cifar10"


def test_pad_and_crop_moves_an_image_by_up_to_an_eighth():
    transform = create_train_transform(CONFIG, train_crop_mode="pad", hflip=0.0, color_jitter=None)
    pixels = np.full((32, 32, 3), 128, dtype=np.uint8)
    pixels[16, 16] = 255
    places = set()
    for _ in range(400):
        place = transform(Image.fromarray(pixels))[0].argmax().item()
        places.add(divmod(place, 32))
    assert {row for row, _ in places} == {column for _, column in places} == set(range(12, 21))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmentation_at_once_gives_a_tensor_of_the_size(channels):
    random.seed(0)
    config = {**CONFIG, "input_size": (channels, 32, 32), "mean": (0.5,) * channels, "std": (0.25,) * channels}
    transform = create_train_transform(config, train_crop_mode="pad", auto_augment="cifar10", cutout=8, re_prob=1.0)
    image = Image.new("L" if channels == 1 else "RGB", (28, 28), 77)
    for _ in range(20):
        assert transform(image).shape == (channels, 32, 32)


def test_without_augmentation_nothing_is_random():
    transform = create_train_transform(CONFIG, no_aug=True, train_crop_mode="pad", auto_augment="cifar10", cutout=8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert torch.equal(transform(image), transform(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutout": -1}, r"cutout .*got -1$"),
        ({"cutout": 1.5}, r"cutout .*got 1\.5$"),
        ({"train_crop_mode": "padd"}, r"train_crop_mode .*rrc, rkrc, rkrr, pad, got 'padd'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_train_transform(CONFIG, **arguments)


def test_pad_and_crop_resizes_larger_images_and_fills_with_grey():
    transform = create_train_transform(CONFIG, train_crop_mode="pad", hflip=0.0, color_jitter=None)
    image = Image.new("RGB", (500, 375), (255, 255, 255))
    seen = torch.stack([transform(image) for _ in range(30)]).unique()
    grey, white = (128 / 255 - 0.5) / 0.25, 2.0
    torch.testing.assert_close(seen, torch.tensor([grey, white]), atol=1e-4, rtol=0)
