"""Exits that learn without labels, from the deepest classifier alone."""

import copy

import datasets
import pytest
import torch
from timm.task import ClassificationTask
from torch.utils.data import Dataset, Subset

from timm_selfdistill import SelfDistillLoss, TrainConfig, Trainer, load_images, model_data_config
from timm_selfdistill.hub import read_metrics

from ..conftest import small_backbone
from .data.test_load import picture
from .frozen_runs import equal, fit, frozen_model


class Images(Dataset):
    """The images of a data set alone."""

    def __init__(self, data: Dataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data[index][0]


@pytest.fixture
def without_labels(few):
    return tuple(map(Images, few))


@pytest.mark.parametrize(
    ("loss", "learns"),
    [
        ({"alpha": 0.3, "beta": 0.03}, "bottleneck proj fc"),
        ({"alpha": 0.5, "hint": None}, "bottleneck proj fc"),
        ({"alpha": 0.0, "beta": 1.0}, "bottleneck proj"),
        ({"alpha": 0.0, "beta": 1.0, "hint": "pooled"}, "bottleneck proj"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*alpha=0 and no labels")
def test_exits_learn_without_labels_from_maps_and_logits(loss, learns, without_labels, tmp_path):
    model = frozen_model()
    before = copy.deepcopy(model.heads.state_dict())
    run = fit(model, without_labels, tmp_path, SelfDistillLoss.paper(**loss), unlabelled=True, weight_decay=0.0)
    changed = {
        key.split(".")[1] for key, value in model.heads.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == set(learns.split())
    rows = run.state.history
    assert rows[0]["train_label_loss"] == 0
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_the_labels_of_unlabelled_runs_are_not_used(few, without_labels, tmp_path):
    with_labels = fit(frozen_model(), few, tmp_path / "with", unlabelled=True)
    without = fit(frozen_model(), without_labels, tmp_path / "without", unlabelled=True)
    assert equal(*(dict(run.eval_model.heads.state_dict()) for run in (with_labels, without)))


def test_without_labels_agreement_with_the_deepest_is_measured_and_called_so(without_labels, tmp_path):
    run = fit(frozen_model(), without_labels, tmp_path, unlabelled=True)
    deepest = run.metrics[-2]
    assert (deepest.top1, deepest.top5) == (100.0, 100.0)
    record = read_metrics(run.output / "best")
    assert record["reference"] == "deepest"
    card = (run.output / "best/README.md").read_text()
    assert "agrees with the deepest" in card
    assert "model-index" not in card


def test_mixup_of_images_without_labels(without_labels, tmp_path):
    run = fit(frozen_model(), without_labels, tmp_path, unlabelled=True, mixup=0.5, mixup_off_epoch=2)
    assert all(row["train_label_loss"] == 0 for row in run.state.history)


def test_a_task_that_needs_labels(few, tmp_path):
    with pytest.raises(TypeError, match=r"\(--unlabelled\) .*SelfDistillTask, .* ClassificationTask .*labels"):
        Trainer(
            ClassificationTask(frozen_model(), verbose=False),
            *few,
            TrainConfig(output=str(tmp_path / "out"), unlabelled=True),
        )


def test_nothing_to_learn_from(without_labels, tmp_path):
    for loss in ({"alpha": 0.0, "beta": 0.0}, {"alpha": 0.0, "hint": None}):
        with pytest.raises(ValueError, match="alpha=0 .*no hint .*set alpha, beta or hint"):
            fit(frozen_model(), without_labels, tmp_path, SelfDistillLoss.paper(**loss), unlabelled=True)
    with pytest.warns(UserWarning, match="alpha=0 .*features .*trained, not their classifiers"):
        fit(frozen_model(), without_labels, tmp_path, SelfDistillLoss.paper(alpha=0.0), unlabelled=True, epochs=1)


def test_a_part_of_images_without_labels(tmp_path):
    for index in range(60):
        picture("L").save(tmp_path / f"{index}.png")
    images = load_images(tmp_path, unlabelled=True, val_fraction=0.5)
    data = images.transformed(model_data_config(small_backbone(in_chans=1), 32, in_chans=1), no_aug=True)
    parts = [Subset(part, range(20)) for part in data]
    run = fit(frozen_model(), parts, tmp_path / "run", unlabelled=True, batch_size=20, epochs=1)
    assert run.metrics[-2].top1 == 100


def test_images_alone_in_a_folder_for_each_split(tmp_path):
    """The folders' names are no labels."""
    for split in ("train", "validation"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for index in range(3):
            picture("L").save(tmp_path / "images" / split / f"{index}.png")
    images = load_images(tmp_path / "images", unlabelled=True)
    assert (images.label_column, images.class_names, list(images.val.features)) == (None, [], ["image"])
    data = images.transformed(model_data_config(small_backbone(in_chans=1), 32, in_chans=1), no_aug=True)
    run = fit(frozen_model(), data, tmp_path / "run", unlabelled=True, batch_size=3, epochs=1)
    assert run.metrics[-2].top1 == 100
    with pytest.raises(ValueError, match=r"train holds 3 images, .*no class folders; .*\(--unlabelled\)"):
        load_images(tmp_path / "images")


@pytest.mark.parametrize(
    ("labels", "column", "warned"),
    [
        ([None] * 4, None, False),
        ([-1] * 4, None, False),
        ([0, 1, None, 1], None, True),
        ([0, -1, 1, 0], None, True),
        ([0, 1, 1, 0], "label", False),
    ],
)
def test_labels_that_are_there_in_part(labels, column, warned, fashion, recwarn):
    rows = fashion.train.select(range(4)).remove_columns("label")
    rows = rows.add_column("label", labels, feature=datasets.ClassLabel(names=["a", "b"]))
    assert load_images({"train": rows, "test": rows}, unlabelled=True).label_column == column
    assert any("4 validation images have no label" in str(found.message) for found in recwarn) == warned


def test_a_network_of_fewer_classes_than_the_labels(fashion):
    images = load_images({"train": fashion.train, "test": fashion.val}, unlabelled=True, num_classes=7)
    with pytest.warns(UserWarning, match=r"\(10: T-shirt/top, \.\.\.\) .*network \(7\): .*agreement"):
        assert images.fitting_labels(7).label_column is None


def test_images_without_labels_in_a_run_that_needs_them(few, without_labels, tmp_path):
    with pytest.raises(ValueError, match=r"training images .*no labels; .*unlabelled=True \(--unlabelled\)"):
        fit(frozen_model(), without_labels, tmp_path)


def test_an_ensemble_that_learns_cannot_teach_without_labels(without_labels, tmp_path):
    with pytest.raises(ValueError, match="unlabelled .*\"deepest\", .*teacher 'ensemble'"):
        fit(frozen_model(), without_labels, tmp_path, SelfDistillLoss(), unlabelled=True)


def test_validation_images_of_other_classes(fashion, tmp_path):
    images = load_images({"train": fashion.train, "test": fashion.val}, unlabelled=True)
    data = images.transformed(model_data_config(small_backbone(in_chans=1), 32, in_chans=1), no_aug=True)
    with pytest.raises(ValueError, match=r"7 classes, .*10; .*images\.fitting_labels\(7\)"):
        fit(frozen_model(num_classes=7), data, tmp_path / "out", unlabelled=True)
