"""Learning rates by layer and for the shallow classifiers; heads that learn alone first."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import Subset

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, wrap_self_distill
from timm_selfdistill.training.loop.optimizer import create_optimizer

from ..conftest import ROOT, run_python, small_backbone, small_model


def scales(model: nn.Module, **settings) -> dict[str, tuple[float, float]]:
    """Factor of the learning rate, and weight decay, of every parameter."""
    optimizer = create_optimizer(model, TrainConfig(weight_decay=0.1, **settings))
    found = {
        id(param): (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for param in group["params"]
    }
    return {name: found[id(param)] for name, param in model.named_parameters()}


def test_layer_decay_sees_the_backbones_groups():
    backbone = small_backbone("test_vit")
    plain = scales(copy.deepcopy(backbone), layer_decay=0.5)
    model = wrap_self_distill(backbone)
    wrapped = scales(model, layer_decay=0.5)
    assert {name: wrapped[f"backbone.{name}"] for name in plain} == plain
    assert wrapped["backbone.pos_embed"] == (0.5**7, 0.0)
    assert wrapped["backbone.blocks.0.mlp.fc1.weight"] == (0.5**6, 0.1)
    assert wrapped["backbone.head.weight"] == (1.0, 0.1)
    assert {scale for name, (scale, _) in wrapped.items() if name.startswith("heads.")} == {1.0}
    assert model.get_classifier() is backbone.head


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_heads_have_a_learning_rate_of_their_own(layer_decay):
    found = scales(small_model(), layer_decay=layer_decay, head_lr_scale=10.0)
    assert {scale for name, (scale, _) in found.items() if name.startswith("heads.")} == {10.0}
    assert found["backbone.fc.weight"] == (1.0, 0.1)
    assert found["backbone.fc.bias"] == (1.0, 0.0)
    assert found["backbone.conv1.0.weight"] == (1.0 if layer_decay is None else 0.5**5, 0.1)


def test_a_backbone_without_groups():
    backbone = small_backbone()
    model = wrap_self_distill(backbone)
    backbone.__class__ = type("Ungrouped", (type(backbone),), {"__getattribute__": hide("group_matcher")})
    with pytest.raises(ValueError, match=r"Ungrouped .*\(group_matcher\), .*layer_decay .*leave it out"):
        scales(model, layer_decay=0.5)


def hide(hidden: str):
    def get(self, name):
        if name == hidden:
            raise AttributeError(name)
        return nn.Module.__getattribute__(self, name)

    return get


def fit(task, data, output, **settings) -> Trainer:
    config = TrainConfig(output=str(output), workers=0, warmup_epochs=0, **{"epochs": 2, "batch_size": 50, **settings})
    trainer = Trainer(task, *data, config)
    trainer.fit()
    return trainer


@pytest.fixture
def few(fashion_tensors):
    return tuple(Subset(part, range(100)) for part in fashion_tensors)


@pytest.mark.parametrize("sched", ["cosine", pytest.param("none", marks=pytest.mark.slow)])
def test_scaled_learning_rates_are_those_of_the_updates(sched, few, tmp_path):
    """SGD without momentum at lr 0: heads do not move, whatever scales them; at scale 0 they alone stay."""
    model = small_model(in_chans=1)
    before = copy.deepcopy(model.state_dict())
    fit(SelfDistillTask(model), few, tmp_path, head_lr_scale=0.0, sched=sched)
    after = model.state_dict()
    params = dict(model.named_parameters())
    for name in params:
        assert torch.equal(after[name], before[name]) == name.startswith("heads."), name


def test_the_classifiers_learn_alone_first(few, tmp_path):
    model = small_model(in_chans=1)
    begin = copy.deepcopy(model.state_dict())
    run = fit(SelfDistillTask(model), few, tmp_path, head_warmup_epochs=1, opt="adamw", lr=1e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())

    def backbone_at(step: int) -> dict[str, torch.Tensor]:
        weights = load_file(run.output / f"checkpoints/step-{step:08d}/model.safetensors")
        return {key: value for key, value in weights.items() if ".backbone." in key and ".fc." not in key}

    for key, value in backbone_at(2).items():
        assert torch.equal(value, begin[key.removeprefix("trainable_module.")]), key
    changed = {
        key
        for key, value in backbone_at(4).items()
        if not torch.equal(value, begin[key.removeprefix("trainable_module.")])
    }
    assert changed == backbone_at(4).keys()


@pytest.mark.slow
def test_the_classifiers_learn_alone_first_on_two_processes(few_images, tmp_path):
    command = [
        ROOT / "examples/train.py",
        "--data-dir",
        few_images,
        "--model",
        "test_resnet",
        "--epochs",
        2,
        "-b",
        22,
        "-j",
        0,
        "--head-warmup-epochs",
        1,
        "--layer-decay",
        0.7,
        "--head-lr-scale",
        2,
    ]
    run_python(*command, "--output", tmp_path / "a", processes=2)
    run_python(*command, "--output", tmp_path / "b", "--resume", tmp_path / "a/checkpoints/step-00000007", processes=2)
    for name in ("history.csv", "last/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_decay": 0.0}, r"^layer_decay .*\(0, 1\], got 0\.0"),
        ({"layer_decay": 1.5}, r"^layer_decay .*\(0, 1\], got 1\.5"),
        ({"head_lr_scale": -1.0}, r"^head_lr_scale .*>= 0, got -1\.0"),
        ({"head_warmup_epochs": -1}, r"^head_warmup_epochs .*>= 0, got -1"),
        ({"head_warmup_epochs": 6}, r"^head_warmup_epochs .*epochs \(6\), got 6; .*freeze the backbone"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_lr_scale": 2.0}, "^head_lr_scale needs a network with exits"),
        ({"head_warmup_epochs": 1}, "^head_warmup_epochs .*with exits .*not frozen"),
    ],
)
def test_a_plain_model_has_no_heads(settings, message, few, tmp_path):
    task = ClassificationTask(timm.create_model("test_resnet", num_classes=10, in_chans=1), verbose=False)
    with pytest.raises(ValueError, match=message):
        fit(task, few, tmp_path, **settings)
