"""Labels of any shape are trained on and measured rightly, or refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from timm.task import ClassificationTask
from torch import Tensor

from timm_selfdistill import SelfDistillLoss, SelfDistillTask, TrainConfig, Trainer, TruncatedModel

from ..conftest import small_model

INDICES = torch.arange(32) % 4
ONE_HOT = torch.eye(4)[INDICES]
SEVERAL = (torch.arange(32)[:, None] % torch.tensor([2, 3, 5, 7]) == 0).float()


def trainer(tmp_path, train: Sequence[Any], val: Sequence[Any], **config) -> Trainer:
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    task = SelfDistillTask(small_model(num_classes=4), SelfDistillLoss(label_loss=config.pop("label_loss", None)))
    settings = TrainConfig(output=str(tmp_path / "run"), epochs=1, batch_size=16, workers=0, **config)
    return Trainer(task, list(zip(images, train)), list(zip(images, val)), settings)


def accuracies(tmp_path, train: Tensor, val: Tensor) -> list[float]:
    torch.manual_seed(0)
    return [row["top1"] for row in trainer(tmp_path, train, val).fit().summary["exits"]]


@pytest.mark.parametrize(
    "val",
    [
        INDICES.int(),
        ONE_HOT * 0.8 + 0.05,
        *(
            pytest.param(val, marks=pytest.mark.slow)
            for val in (INDICES[:, None], INDICES.to(torch.uint8), ONE_HOT, ONE_HOT.double(), ONE_HOT.long())
        ),
    ],
)
def test_labels_that_mean_one_class_are_measured_alike(val, tmp_path):
    expected = accuracies(tmp_path / "a", INDICES, INDICES)
    assert accuracies(tmp_path / "b", INDICES, val) == expected


@pytest.mark.parametrize("train", [INDICES[:, None], INDICES.int(), ONE_HOT, ONE_HOT * 0.8 + 0.05])
def test_labels_that_are_trained_on(train, tmp_path):
    rows = trainer(tmp_path, train, INDICES).fit().summary["exits"]
    assert all(0 <= row["top1"] <= 100 for row in rows)


@pytest.mark.parametrize(
    ("train", "val", "config", "message"),
    [
        (
            SEVERAL,
            INDICES,
            {"label_loss": torch.nn.BCEWithLogitsLoss()},
            r"training labels .*class indices \(B,\) from 0 to 3, or soft labels \(B, 4\) that sum to 1, got"
            r" torch.float32 of shape \(1, 4\), .*several classes",
        ),
        (INDICES, SEVERAL, {}, r"validation labels .*got torch.float32 of shape \(1, 4\), .*several classes"),
        (INDICES, SEVERAL.long(), {}, r"validation labels .*got torch.int64 of shape \(1, 4\), .*several classes"),
        (INDICES.float(), INDICES, {}, r"got torch.float32 of shape \(1,\)"),
        (INDICES, INDICES.double(), {}, r"got torch.float64 of shape \(1,\)"),
        (INDICES > 1, INDICES, {}, r"got torch.bool of shape \(1,\)"),
        (INDICES + 4, INDICES, {}, r"from 0 to 3, .*got torch.int64 of shape \(1,\), with the class index 4"),
        (INDICES, INDICES - 2, {}, "with the class index -2"),
        (torch.zeros(32, 7), INDICES, {}, r"got torch.float32 of shape \(1, 7\)"),
        (INDICES[:, None, None], INDICES, {}, r"shape \(1, 1, 1\)"),
        (["cat"] * 32, INDICES, {}, "training labels .*got a list"),
        ([[0, 1]] * 32, INDICES, {}, "training labels .*got a list"),
        (ONE_HOT, INDICES, {"mixup": 0.5}, "mixup, .*training images already have soft labels"),
        (ONE_HOT, INDICES, {"smoothing": 0.1}, "smoothing .*training images already have soft labels"),
    ],
)
def test_other_labels_are_refused_at_once(train, val, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, train, val, **config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_later_label_that_is_wrong_is_refused_when_it_comes(which, tmp_path):
    labels = {"train": ONE_HOT.clone(), "val": INDICES.clone()}
    if which == "train":
        labels["train"][20] = 1
    else:
        labels["val"][20] = 4
    run = trainer(tmp_path, **labels)
    with pytest.raises(ValueError, match="several classes" if which == "train" else "class index 4"):
        run.fit()


class Samples(list):
    """As a data set."""


IMAGE = torch.zeros(3, 32, 32)


@pytest.mark.parametrize(
    ("sample", "got"),
    [
        ({"image": IMAGE, "label": 0}, "got a dict of image, label"),
        ((IMAGE, 0, 0), r"got \(float32 tensor \(3, 32, 32\), int, int\)"),
        ((IMAGE.to(torch.uint8), 0), r"got \(uint8 tensor \(3, 32, 32\), int\)"),
        ((IMAGE[0], 0), r"got \(float32 tensor \(32, 32\), int\)"),
        ((Image.new("RGB", (32, 32)), 0), r"got \(Image, int\)"),
        (("cat.jpg", "cat"), r"got \(str, str\)"),
    ],
)
@pytest.mark.parametrize("which", ["training", "validation"])
def test_samples_that_are_no_images_are_refused(sample, got, which, tmp_path):
    data = {"training": [(IMAGE, 0)] * 8, "validation": [(IMAGE, 0)] * 8} | {which: [sample] * 8}
    with pytest.raises(TypeError, match=rf"expected {which} samples \(image, label\) .*{got}; convert"):
        Trainer(SelfDistillTask(small_model()), data["training"], data["validation"], TrainConfig(batch_size=4))


def test_a_loader_is_no_data_set():
    loader = torch.utils.data.DataLoader(Samples([(IMAGE, 0)] * 8))
    with pytest.raises(TypeError, match="training data must be a dataset, .*a DataLoader; pass its dataset, Sam"):
        Trainer(SelfDistillTask(small_model()), loader, [(IMAGE, 0)])


def test_one_exit_is_trained_as_any_network(tmp_path):
    torch.manual_seed(0)
    network = small_model(num_classes=4).truncate(1)
    images = torch.randn(32, 3, 32, 32)
    data = list(zip(images, INDICES))
    task = ClassificationTask(network, torch.nn.CrossEntropyLoss(), verbose=False)
    summary = (
        Trainer(task, data, data, TrainConfig(output=str(tmp_path / "run"), epochs=1, batch_size=16, workers=0))
        .fit()
        .summary
    )
    loaded = TruncatedModel.from_pretrained(tmp_path / "run/best")
    with torch.no_grad():
        right = (loaded(images).argmax(1) == INDICES).float().mean()
    assert summary["exits"][0]["top1"] == pytest.approx(100 * float(right))
