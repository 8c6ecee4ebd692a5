"""Exits that were trained before go on."""

import argparse
import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from timm.utils import CheckpointSaver, unwrap_model
from torch import nn

from timm_selfdistill import SelfDistillModel, SelfDistillTask, load_images, wrap_self_distill
from timm_selfdistill.cli import check_method_flags, create_task, parse_args, take_over_exits, train_parser
from timm_selfdistill.training.loop.initial_weights import create_backbone, find_saved_weights, read_weights

from ..conftest import ROOT, run_python, small_backbone, small_model

TRAIN = (ROOT / "examples/train.py", "--no-aug", "--in-chans", 1, "--epochs", 1, "-b", 64, "-j", 0)


@pytest.fixture(scope="module")
def run(few_images, tmp_path_factory):
    """A run with a moving average."""
    folder = tmp_path_factory.mktemp("run") / "run"
    run_python(
        *TRAIN,
        "--model",
        "test_resnet",
        "--data-dir",
        few_images,
        "--model-ema",
        "--model-ema-decay",
        0.5,
        "--head",
        "attention",
        "--exits",
        1,
        3,
        "--output",
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model whose exits are not those that are chosen by default."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("saved")
    small_model(exits=["layer1", "layer3"], head="attention", head_args={"width": 24}).save_pretrained(folder)
    return folder


def begin(*flags: object, num_classes: int = 10, in_chans: int = 3) -> tuple[nn.Module, argparse.Namespace]:
    """The network that a run begins with, as examples/train.py makes it."""
    args = parse_args(train_parser("", "images"), list(map(str, flags)))
    check_method_flags(args)
    weights = find_saved_weights(args.model, args.pretrained, args.initial_checkpoint, args.pretrained_path)
    take_over_exits(args, weights)
    backbone = create_backbone(
        args.model,
        pretrained=args.pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        initial_checkpoint=args.initial_checkpoint,
        pretrained_path=args.pretrained_path,
    )
    return create_task(args, backbone, lambda: None, weights).get_eval_model(), args


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("more", [[], ["--freeze-backbone"], ["--method", "dsn"], ["--method", "dks"]])
def test_a_saved_model_goes_on_with_its_exits(more, saved, capsys):
    for flags in (
        ["--model", f"local-dir:{saved}", "--pretrained"],
        ["--model", "test_resnet", "--initial-checkpoint", saved / "model.safetensors"],
        ["--model", "test_resnet", "--initial-checkpoint", saved],
    ):
        model, args = begin(*flags, *more)
        assert same(model, SelfDistillModel.from_pretrained(saved).state_dict())
        assert (args.exits, args.head) == (["1", "3"], "attention")
        assert model.head_args == {"width": 24}
        said = capsys.readouterr().out
        assert re.fullmatch(rf"loaded the heads of {saved}.* for the exits at layer1, layer3\n", said)


def test_weights_that_are_not_asked_for_are_named(saved):
    with pytest.warns(UserWarning, match=f"local-dir:{saved}, exits included, are not loaded; add --pretrained"):
        begin("--model", f"local-dir:{saved}")


def test_what_differs_begins_anew_and_it_is_said(saved, capsys):
    model, _ = begin("--model", f"local-dir:{saved}", "--pretrained", "--exits", "layer2", "layer3")
    trained = SelfDistillModel.from_pretrained(saved)
    assert same(model.heads[1], trained.heads[1].state_dict())
    assert capsys.readouterr().out.splitlines() == [
        f"loaded the heads of {saved} for the exit at layer3",
        f"random initialization for the exit at layer2: {saved} has no exit there",
        f"trained exits of {saved} not used: layer1",
    ]
    model, _ = begin("--model", f"local-dir:{saved}", "--pretrained", "--head", "linear")
    assert model.exits == ("layer1", "layer3", "layer4")
    assert capsys.readouterr().out.splitlines() == [
        f"random initialization for the exits at layer1, layer3: {saved} has attention heads, this model has linear"
        " heads"
    ]
    for flags in (
        ["--model", f"local-dir:{saved}", "--pretrained"],
        ["--model", "test_resnet", "--pretrained-path", saved / "model.safetensors"],
    ):
        model, _ = begin(*flags, num_classes=7)
        assert model.num_classes == model.heads[0].fc.out_features == 7
        assert same(model.backbone.layer1, trained.backbone.layer1.state_dict())
        assert (
            "random initialization for the exits at layer1, layer3: the classifiers are new, those of"
            in capsys.readouterr().out
        )
    begin("--model", "test_resnet", "--pretrained-path", saved / "model.safetensors")
    assert "layer3: the classifiers are new" in capsys.readouterr().out
    model, _ = begin("--model", f"local-dir:{saved}", "--pretrained", "--method", "plain")
    assert same(model, trained.backbone.state_dict())
    assert "trained exits of" in (said := capsys.readouterr().out)
    assert "not used: --method plain" in said
    model, args = begin("--model", f"local-dir:{saved}")
    assert (args.exits, args.head) == (None, "bottleneck")
    assert capsys.readouterr().out == ""


def test_heads_of_a_callable_and_truncated_models(saved, tmp_path, capsys):
    small_model(exits=["layer2"], head=lambda stage, teacher, classes: Pooled(stage, teacher, classes)).save_pretrained(
        tmp_path / "own"
    )
    for flags in (
        ["--model", f"local-dir:{tmp_path / 'own'}", "--pretrained"],
        ["--model", "test_resnet", "--initial-checkpoint", tmp_path / "own"],
    ):
        assert begin(*flags)[0].exits == ("layer2", "layer4")
        assert "random initialization for the exit at layer2: the heads of" in (said := capsys.readouterr().out)
        assert "created by a callable" in said
    SelfDistillModel.from_pretrained(saved).truncate(0).save_pretrained(tmp_path / "cut")
    for flags in (
        ["--model", f"local-dir:{tmp_path / 'cut'}", "--pretrained"],
        ["--model", "test_resnet", "--initial-checkpoint", tmp_path / "cut"],
    ):
        with pytest.raises(ValueError, match="truncated model with only one exit.*full model"):
            begin(*flags)
    with pytest.raises(ValueError, match=r"self_distill\.safetensors holds only the exits; give .*model\.safetensors"):
        begin("--model", "test_resnet", "--initial-checkpoint", saved / "self_distill.safetensors")


class Pooled(nn.Module):
    def __init__(self, stage, teacher, num_classes):
        super().__init__()
        self.proj, self.fc = nn.Conv2d(stage.channels, teacher.channels, 1), nn.Linear(teacher.channels, num_classes)

    def forward(self, x):
        feature = self.proj(x)
        return self.fc(feature.mean((2, 3))), feature


def write_timm_checkpoint(folder, model, ema: bool = False, **more):
    """As timm's training script writes it."""
    task = SelfDistillTask(model)
    if ema:
        task.setup_ema(decay=0.5)
        for value in task.trainable_module_ema.module.parameters():
            value.data += 1
    folder.mkdir()
    args = argparse.Namespace(model="test_resnet", mean=[0.25] * 3, img_size=96, **more)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CheckpointSaver(model, optimizer, args, checkpoint_dir=str(folder), task=task).save_checkpoint(0, metric=1.0)
    return folder / "last.pth.tar", task


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_of_timms_training_script(ema, frozen, saved, tmp_path, capsys):
    model = SelfDistillModel.from_pretrained(saved)
    model = wrap_self_distill(
        model.backbone, exits=[1, 3], head="attention", head_args={"width": 24}, freeze_backbone=frozen
    )
    path, task = write_timm_checkpoint(tmp_path / "timm", model, ema)
    loaded, _ = begin("--model", "test_resnet", "--initial-checkpoint", path)
    assert same(loaded, unwrap_model(task.get_eval_model(ema=ema)).state_dict())
    assert loaded.exits == ("layer1", "layer3", "layer4")
    assert (f"using the moving average in {path}" in capsys.readouterr().out) == ema


@pytest.mark.parametrize("head", ["bottleneck", "attention", "linear"])
def test_exits_without_a_record_are_guessed_and_it_is_said(head, tmp_path, capsys):
    model = small_model(head=head)
    state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    loaded, args = begin("--model", "test_resnet", "--initial-checkpoint", tmp_path / "a.pth")
    assert same(loaded, model.state_dict())
    assert args.head == head
    said = "does not record where its 3 heads belong; they are assumed to belong to layer1, "
    assert said in capsys.readouterr().out
    begin("--model", "test_resnet", "--initial-checkpoint", tmp_path / "a.pth", "--exits", "layer1")
    assert "random initialization for the exit at " in (said := capsys.readouterr().out)
    assert "has 3 heads but does not record where they belong; give 3 --exits" in said


def test_a_damaged_record_of_exits(tmp_path):
    state = small_model().state_dict()
    for record in ({"architecture": "test_resnet"}, [1], {"self_distill": None}):
        torch.save({"state_dict": state, "self_distill": record}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth.*"):
            read_weights(tmp_path / "a.pth")


def test_a_record_of_exits_in_another_format(tmp_path):
    state = SelfDistillTask(small_model()).get_checkpoint_state()
    torch.save(state, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").exits
    state["self_distill"]["self_distill"] |= {"format_version": 1, "timm_selfdistill_version": "0.1.0"}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth has format version 1, .*reads 2; .*'0\.1\.0'\): install that one"):
        read_weights(tmp_path / "a.pth")


def test_checkpoints_and_directories_of_a_run(run, tmp_path, capsys):
    (checkpoint,) = (run / "checkpoints").iterdir()
    expected = SelfDistillModel.from_pretrained(run / "last").state_dict()
    for path in (checkpoint, checkpoint / "model.safetensors", run, run / "best"):
        model, args = begin("--model", "test_resnet", "--initial-checkpoint", path, in_chans=1)
        assert same(model, expected)
        assert args.exits == ["1", "3"]
        assert model.backbone.pretrained_cfg["label_names"][9] == "Ankle boot"
        assert ("moving average" in capsys.readouterr().out) == (checkpoint in (path, path.parent))
    alone = shutil.copytree(checkpoint, tmp_path / "alone/a/step-1")
    model, _ = begin("--model", "test_resnet", "--initial-checkpoint", alone, "--exits", 1, 3, in_chans=1)
    assert same(model, expected)
    with (alone / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="is damaged; use another checkpoint"):
        begin("--model", "test_resnet", "--initial-checkpoint", alone, in_chans=1)


@pytest.mark.slow
def test_a_checkpoint_of_a_frozen_backbone(run, few_images, tmp_path):
    command = [
        *TRAIN,
        "--model",
        f"local-dir:{run / 'best'}",
        "--pretrained",
        "--freeze-backbone",
        "--data-dir",
        few_images,
        "--lr",
        0,
        "--warmup-epochs",
        0,
        "--model-ema",
        "--model-ema-decay",
        0,
        "--output",
        tmp_path / "frozen",
    ]
    done = run_python(*command)
    assert f"loaded the heads of {run / 'best'} for the exits at layer1, layer3" in done.stdout
    names = [name for name, _ in SelfDistillModel.from_pretrained(run / "best").named_parameters()]
    before, after = (load_file(folder / "best/self_distill.safetensors") for folder in (run, tmp_path / "frozen"))
    assert all(torch.equal(before[name], after[name]) for name in before if f"heads.{name}" in names)
    settings = yaml.safe_load((tmp_path / "frozen/config.yaml").read_text())
    assert (settings["exits"], settings["head"]) == (["1", "3"], "attention")
    resumed = run_python(*command, "--resume", "--epochs", 2)
    assert "resumed" in resumed.stdout

    checkpoint = sorted((tmp_path / "frozen/checkpoints").iterdir())[-1]
    model, _ = begin("--model", "test_resnet", "--initial-checkpoint", checkpoint, in_chans=1)
    assert same(model, SelfDistillModel.from_pretrained(tmp_path / "frozen/last").state_dict())
    shutil.copytree(checkpoint, tmp_path / "alone/a/step-1")
    with pytest.raises(ValueError, match="holds only the exits of a frozen backbone.*give best/ or last/"):
        read_weights(tmp_path / "alone/a/step-1")


def test_images_of_other_classes_are_refused_with_both_lists(run, few_images, tmp_path):
    images = load_images(few_images)
    names = ["boat", *images.class_names[1:]]
    for split, rows in (("train", images.train), ("test", images.val)):
        feature = rows.features[images.label_column]
        feature = type(feature)(names=names)
        rows.cast_column(images.label_column, type(feature)(num_classes=10)).cast_column(
            images.label_column, feature
        ).to_parquet(tmp_path / f"images/{split}.parquet")
    for weights in (
        ["--model", f"local-dir:{run / 'best'}", "--pretrained"],
        ["--model", "test_resnet", "--initial-checkpoint", run / "best/model.safetensors"],
    ):
        refused = run_python(
            *TRAIN, *weights, "--data-dir", tmp_path / "images", "--output", tmp_path / "out", check=False
        )
        assert refused.returncode == 2
        for part in ("T-shirt", "'boat'", "--pretrained-path"):
            assert part in refused.stderr
    assert json.loads((run / "best/config.json").read_text())["label_names"][9] == "Ankle boot"


def test_python_loads_a_model_with_new_classifiers(saved):
    model = SelfDistillModel.from_pretrained(saved, num_classes=7)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert [head.fc.out_features for head in model.heads] == [7, 7]
    assert "label_names" not in model.backbone.pretrained_cfg
    same_classes = SelfDistillModel.from_pretrained(saved, num_classes=10)
    assert same(same_classes, SelfDistillModel.from_pretrained(saved).state_dict())
    assert same(model.backbone.layer4, same_classes.backbone.layer4.state_dict())


def test_small_backbones_have_no_exits(tmp_path):
    torch.save(small_backbone().state_dict(), tmp_path / "a.pth")
    assert not read_weights(tmp_path / "a.pth").has_exits
    assert find_saved_weights("test_resnet", True, None, None) is None
