"""Several views of an image: timm's --aug-splits, --jsd-loss, --split-bn and --resplit."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import AugMixDataset, create_transform, resolve_model_data_config
from timm.layers import SplitBatchNorm2d, convert_splitbn_model
from timm.loss import JsdCrossEntropy

from timm_selfdistill import (
    SelfDistillModel,
    SelfDistillOutput,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    model_data_config,
)
from timm_selfdistill.cli import parse_args, train_parser
from timm_selfdistill.cli.methods import check_method_flags, exit_loss
from timm_selfdistill.hub import read_metrics
from timm_selfdistill.training.data.sampling import seeded
from timm_selfdistill.training.data.transforms import create_train_transform, view_by_view

from .conftest import run_python, small_backbone, small_model

AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0}


def parse(*flags: object):
    return parse_args(train_parser("", "images"), list(map(str, flags)))


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("splits", [2, 3])
def test_views_are_timms(splits, picture):
    class Pictures(torch.utils.data.Dataset):
        transform = None

        def __getitem__(self, index):
            return self.transform(picture), index

    config = resolve_model_data_config(small_backbone())
    images = Pictures()
    images.transform = create_transform(**config, is_training=True, separate=True, **AUGMENTED)
    expected = AugMixDataset(images, splits)
    own = create_train_transform(config, aug_splits=splits, **AUGMENTED)
    with seeded(1):
        views, _ = expected[0]
    with seeded(1):
        assert torch.equal(own(picture), torch.stack(views))


def test_the_first_view_is_erased_unless_told_otherwise(picture):
    config = resolve_model_data_config(small_backbone())
    for resplit in (False, True):
        transform = create_train_transform(
            config,
            aug_splits=2,
            resplit=resplit,
            train_crop_mode="pad",
            auto_augment="cifar10",
            cutout=4,
            re_prob=1.0,
            re_mode="const",
        )
        with seeded(1):
            views = transform(picture)
        erased = [(view == 0).all(0).sum() for view in views]
        assert erased[1] > 16
        assert (erased[0] <= 16) == resplit


def test_a_batch_is_put_in_the_order_of_the_views():
    x, y = torch.arange(6.0).view(3, 2, 1, 1, 1), torch.tensor([5, 6, 7])
    images, labels = view_by_view(x, y)
    assert images.flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert labels.tolist() == [5, 6, 7, 5, 6, 7]
    assert view_by_view(x[:, 0], y)[1] is y


@pytest.mark.parametrize("teacher", ["ensemble", "deepest"])
def test_the_loss_of_the_labels_is_timms(teacher):
    args = parse("--aug-splits", 3, "--jsd-loss", "--smoothing", 0.1, "--teacher", teacher, "--alpha", 0.4)
    check_method_flags(args)
    loss, reference = exit_loss(vars(args)), JsdCrossEntropy(3, smoothing=0.1)
    logits, target = torch.randn(3, 12, 7), torch.randint(7, (4,)).repeat(3)
    terms = loss.terms(SelfDistillOutput(tuple(logits), tuple(logits)), target)
    labels = torch.stack([reference(z, target) for z in logits])
    weights = torch.tensor([0.6, 0.6, 0.6 if teacher == "ensemble" else 1.0])
    torch.testing.assert_close(terms["label"], (weights * labels).sum())
    assert terms["distill"] > 0


def test_labels_that_the_loss_smooths_stay_as_they_are(fashion, tmp_path):
    """An update of the Trainer is that of timm's loss on the views, one after the other."""
    torch.manual_seed(0)
    args = parse("--aug-splits", 2, "--jsd-loss", "--smoothing", 0.1)
    model = small_model(in_chans=1)
    data = fashion.transformed(model_data_config(model.backbone, 32, in_chans=1), aug_splits=2)
    task = SelfDistillTask(model, exit_loss(vars(args)))
    trainer = Trainer(
        task,
        *data,
        TrainConfig(
            output=str(tmp_path / "run"), epochs=1, batch_size=4, workers=0, smoothing=0.1, lr=0.0, warmup_epochs=0
        ),
    )
    assert trainer.input_size == (1, 32, 32)
    batch = next(trainer.batches.batches(0, 0))
    expected = task.train()(batch[0].transpose(0, 1).flatten(0, 1), batch[1].repeat(2))["loss"].item()
    losses = trainer.update([batch], 0, 1, 1)
    assert losses["loss"].item() == pytest.approx(expected)


@pytest.mark.slow
def test_a_run_and_what_it_saves(few_images, tmp_path):
    """The saved network has no auxiliary batch norms, and is what was measured; its run is resumed with them."""
    flags = [
        "--data-dir",
        few_images,
        "--model",
        "test_resnet",
        "--img-size",
        32,
        "-b",
        32,
        "-j",
        0,
        "--aug-splits",
        3,
        "--split-bn",
        "--jsd-loss",
        "--resplit",
        "--aa",
        "rand-m9",
        "--reprob",
        0.3,
        "--smoothing",
        0.1,
        "--lr",
        0.01,
        "--output",
        tmp_path / "run",
    ]
    run_python("-m", "timm_selfdistill", "train", *flags, "--epochs", 1)
    run_python("-m", "timm_selfdistill", "train", *flags, "--epochs", 2, "--resume")
    saved, loaded = (
        load_file(tmp_path / "run/last/model.safetensors"),
        SelfDistillModel.from_pretrained(tmp_path / "run/last"),
    )
    assert saved.keys() == loaded.backbone.state_dict().keys()
    found = run_python("-m", "timm_selfdistill", "evaluate", tmp_path / "run/last").stdout
    for row in read_metrics(tmp_path / "run/last")["exits"]:
        assert f"{row['top1']:.2f}" in found
    checkpoint = tmp_path / "run/checkpoints"
    again = run_python(
        "-m",
        "timm_selfdistill",
        "train",
        "--data-dir",
        few_images,
        "--model",
        "test_resnet",
        "--img-size",
        32,
        "-b",
        32,
        "-j",
        0,
        "--epochs",
        1,
        "--lr",
        0,
        "--warmup-epochs",
        0,
        "--output",
        tmp_path / "other",
        "--initial-checkpoint",
        sorted(checkpoint.iterdir())[-1],
    )
    assert "all exits" in again.stdout


def test_batch_norms_of_their_own_train_and_are_not_saved(tmp_path):
    model = small_model("test_efficientnet")
    convert_splitbn_model(model, 2)
    assert any(isinstance(part, SplitBatchNorm2d) for part in model.modules())
    x = torch.randn(4, 3, 64, 64)
    assert all(z.shape == (4, 10) for z in model.train().forward_exits(x).logits)
    model.eval().save_pretrained(tmp_path)
    loaded = SelfDistillModel.from_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == loaded.backbone.state_dict().keys()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aug-splits", 3], "--aug-splits 3 has no effect without --jsd-loss or --split-bn"),
        (["--aug-splits", 1, "--jsd-loss"], "--aug-splits must be 0 .off. or at least 2, got 1"),
        (["--jsd-loss"], "--jsd-loss needs several views of each image; add --aug-splits"),
        (["--split-bn"], "--split-bn needs several views"),
        (["--resplit"], "--resplit needs several views"),
        (["--aug-splits", 2, "--jsd-loss", "--mixup", 0.2], "does not work with --mixup"),
        (["--aug-splits", 2, "--jsd-loss", "--no-aug"], "does not work with --no-aug"),
        (["--aug-splits", 2, "--jsd-loss", "--bce-loss"], "--jsd-loss and --bce-loss are different label losses"),
        (["--aug-splits", 2, "--split-bn", "--sync-bn"], "--split-bn and --sync-bn are different kinds"),
        (["--aug-splits", 2, "--jsd-loss", "-b", "auto"], "auto does not work with --aug-splits"),
        (["--aug-splits", 2, "--jsd-loss", "--method", "dml"], "--method dml has its own label loss"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        check_method_flags(parse(*flags))
