"""timm's own functions on wrapped and truncated models, beside the same functions on the plain network."""

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config, resolve_input_data_config, resolve_model_data_config
from timm.layers import apply_test_time_pool
from timm.optim import create_optimizer_v2
from timm.task import FeatureDistillationTask
from timm.utils import ModelEmaV3, freeze, reparameterize_model, unwrap_model
from torch import nn

from timm_selfdistill import EarlyExit, TruncatedModel, load_pretrained, wrap_self_distill
from timm_selfdistill.heads import LinearHead

from .conftest import small_backbone, small_model

NAMES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet"]
ATTRIBUTES = [
    "pretrained_cfg",
    "default_cfg",
    "feature_info",
    "num_features",
    "head_hidden_size",
    "num_classes",
    "in_chans",
    "_traits",
]


def variants(model) -> list[nn.Module]:
    return [model, *(model.truncate(exit) for exit in (0, 1, -1, "ensemble"))]


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_the_backbones_own(name):
    backbone = small_backbone(name)
    model = wrap_self_distill(backbone)
    assert all(getattr(model, key) is getattr(backbone, key) for key in ATTRIBUTES)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert all(getattr(made, key) is getattr(made.backbone, key) for key in ATTRIBUTES)
        assert made.pretrained_cfg == backbone.pretrained_cfg
    del backbone.head_hidden_size
    assert not hasattr(model, "head_hidden_size")


@pytest.mark.parametrize("name", NAMES)
def test_preprocessing_is_the_networks_wherever_it_is_asked_for(name, tmp_path):
    backbone = small_backbone(name)
    backbone.pretrained_cfg.update(
        input_size=(3, 77, 77),
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        interpolation="nearest",
        crop_pct=0.7,
        test_input_size=(3, 88, 88),
        test_crop_pct=0.8,
    )
    model = wrap_self_distill(backbone)
    for number, made in enumerate(variants(model)):
        assert resolve_model_data_config(made)["mean"] == (0.1, 0.2, 0.3)
        for resolve in (resolve_model_data_config, resolve_input_data_config):
            for use_test_size in (False, True):
                expected = resolve(backbone, use_test_size=use_test_size)
                assert resolve(made, use_test_size=use_test_size) == expected
        assert resolve_data_config({"crop_pct": 0.5}, model=made) == resolve_data_config(
            {"crop_pct": 0.5}, model=backbone
        )
        assert str(create_transform(**resolve_model_data_config(made))) == str(
            create_transform(**resolve_model_data_config(backbone))
        )
        made.save_pretrained(tmp_path / str(number), check=False)
        plain = timm.create_model(f"local-dir:{tmp_path}/0", pretrained=True)
        loaded = resolve_model_data_config(load_pretrained(tmp_path / str(number)))
        assert json.dumps(loaded) == json.dumps(resolve_model_data_config(plain))
        assert tuple(loaded["mean"]) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", NAMES)
def test_features_and_head_in_two_steps_are_the_logits(name):
    backbone = small_backbone(name)
    model = wrap_self_distill(backbone).eval()
    x = torch.randn(2, *backbone.pretrained_cfg["input_size"])
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model(x))
        hidden = backbone.forward_head(features, pre_logits=True)
        assert torch.equal(model.forward_head(features, pre_logits=True), hidden)
        for exit in (0, 1, -1):
            made = model.truncate(exit)
            features = made.forward_features(x)
            assert torch.equal(made.forward_head(features), made(x))
            assert made.forward_head(features, pre_logits=True).shape == (2, made.head_hidden_size)
            if exit != -1:
                assert features.shape[1] == made.num_features == made.feature_info[-1]["num_chs"]
                assert made.feature_info == model.feature_info[: len(made.feature_info)]
                assert made.feature_info[-1]["module"] == model.exits[exit]
    with pytest.raises(ValueError, match="ensemble .*several levels.*call the model itself"):
        model.truncate("ensemble").forward_head(features)


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_and_other_functions_take_every_parameter(name):
    for made in variants(small_model(name)):
        for more in ({}, {"layer_decay": 0.5}):
            optimizer = create_optimizer_v2(made, "adamw", lr=0.1, weight_decay=0.1, **more)
            groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            assert groups.keys() == {id(p) for p in made.parameters()}
            exempt = [p for key, p in made.named_parameters() if key in made.no_weight_decay()]
            assert all(groups[id(p)]["weight_decay"] == 0 for p in exempt)
        first, last = made.backbone.get_parameter(first_weight(made.backbone)), [*made.parameters()][-1]
        assert groups[id(first)]["lr_scale"] < groups[id(last)]["lr_scale"] == 1
        made.set_grad_checkpointing()
        assert unwrap_model(ModelEmaV3(made)).pretrained_cfg == made.pretrained_cfg
        made.eval()
        x = torch.randn(2, *made.pretrained_cfg["input_size"])
        with torch.no_grad():
            torch.testing.assert_close(reparameterize_model(made)(x), made(x), rtol=1e-3, atol=1e-4)
        freeze(made)
        assert not any(p.requires_grad for p in made.parameters())


def first_weight(backbone: nn.Module) -> str:
    return next(name for name, p in backbone.named_parameters() if p.ndim == 4)


def test_classifiers_are_found():
    model = small_model()
    assert model.get_classifier() is model.backbone.fc
    assert model.get_submodule(model.get_classifier(name_only=True)) is model.backbone.fc
    made = model.truncate(1)
    assert made.get_classifier() is made.heads[1].fc
    assert made.get_submodule(made.get_classifier(name_only=True)) is made.heads[1].fc
    assert model.truncate(-1).get_classifier().weight.shape == (10, model.num_features)
    pair = small_model("deit_tiny_distilled_patch16_224")
    pair.train_classifiers_alone(True)
    learning = {name for name, p in pair.named_parameters() if p.requires_grad and name.startswith("backbone.")}
    assert learning == {f"backbone.{name}.{part}" for name in ("head", "head_dist") for part in ("weight", "bias")}


def test_feature_distillation_takes_an_exit_as_student_and_a_wrapped_model_as_teacher():
    teacher, student = small_model("test_resnet").eval(), small_model("test_resnet").truncate(0).train()
    task = FeatureDistillationTask(student, teacher, criterion=nn.CrossEntropyLoss(), verbose=False)
    task(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))["loss"].backward()
    assert all(p.grad is not None for p in student.heads[0].fc.parameters())


def test_test_time_pooling_says_what_to_do():
    model = small_model()
    with pytest.raises(ValueError, match=r"num_classes .*at least 1, got 0; .*strip\(\)"):
        apply_test_time_pool(model, {"input_size": (3, 999, 999)})
    apply_test_time_pool(model.strip(), {"input_size": (3, 999, 999)})


@pytest.mark.parametrize("head", ["bottleneck", "attention", "linear", LinearHead])
@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_vit",
        "test_efficientnet",
        pytest.param("deit_tiny_distilled_patch16_224", marks=pytest.mark.slow),
    ],
)
def test_other_classes_renew_all_classifiers(name, head, tmp_path):
    model = wrap_self_distill(small_backbone(name, num_classes=10), head=head, model_args={"num_classes": 10}).eval()
    model.early_exit = {"policy": "confidence", "thresholds": [0.5] * len(model.stages)}
    features, old = copy.deepcopy(model.backbone.state_dict()), list(model.heads)
    model.reset_classifier(4)
    assert (model.num_classes, model.backbone.num_classes, model.early_exit) == (4, 4, None)
    assert not any(first is second for first, second in zip(old, model.heads))
    assert not any(module.training for module in model.modules())
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert {logits.shape for logits in model.forward_exits(x).logits} == {(2, 4)}
    kept = {
        key
        for key, value in model.backbone.state_dict().items()
        if value.shape == features[key].shape and torch.equal(value, features[key])
    }
    assert {key.split(".")[0] for key in features.keys() - kept} <= {"fc", "head", "head_dist", "classifier"}
    EarlyExit(model, 0.5).predict(x)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, head=None if isinstance(head, str) else head)
    assert torch.equal(loaded.predict(x, 0), model.predict(x, 0))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("exit", [0, -1, "ensemble"])
def test_other_classes_of_a_truncated_model(exit, tmp_path):
    made = small_model().to(torch.bfloat16).truncate(exit).train()
    made.reset_classifier(4)
    assert made.num_classes == made.full_backbone.num_classes == 4
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert all(module.training for module in made.modules())
    made = made.float().eval()
    x = torch.randn(2, 3, 64, 64)
    assert made(x).shape == (2, 4)
    made.save_pretrained(tmp_path)
    assert torch.equal(TruncatedModel.from_pretrained(tmp_path)(x), made(x))


def test_classes_that_cannot_be_learned_are_refused():
    for made in (small_model(), small_model().truncate(0)):
        for number in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match=f"num_classes .*at least 1, got {number!r}"):
                made.reset_classifier(number)
        assert made.num_classes == 10
        assert made.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    with pytest.raises(ValueError, match="frozen.*never learn.*wrap"):
        small_model(freeze_backbone=True).reset_classifier(5)
    with pytest.raises(ValueError, match="exit 0 pools .*global_pool='max'"):
        small_model().truncate(0).reset_classifier(5, "max")
    model = small_model()
    model.reset_classifier(5, "max")
    assert model.backbone.global_pool.pool_type == "max"


@pytest.mark.parametrize("name", ["test_vit", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)])
def test_another_input_size(name, tmp_path):
    size = 96 if name == "test_vit" else 128
    made_for = timm.create_model(name, num_classes=10).pretrained_cfg["input_size"][-1]
    model = wrap_self_distill(small_backbone(name, img_size=made_for), model_args={"img_size": made_for}).eval()
    for number, made in enumerate([model, model.truncate(0)]):
        made.set_input_size(img_size=size)
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            expected = made(x)
            made.save_pretrained(tmp_path / str(number))
            assert torch.equal(load_pretrained(tmp_path / str(number))(x), expected)


def test_the_input_size_of_a_network_that_takes_any(tmp_path):
    model = small_model("test_resnet")
    model.train()(torch.randn(2, 3, 48, 48))
    assert model.input_size == (3, 48, 48)
    model.set_input_size(64)
    assert model.input_size == (3, 64, 64)
    with pytest.raises(TypeError, match="img_size only, got patch_size"):
        model.set_input_size(patch_size=4)


def test_a_wrapped_model_is_not_wrapped_again():
    for made in (small_model(), small_model().truncate(0)):
        with pytest.raises(TypeError, match="is wrapped already; wrap the timm model in it, its backbone"):
            wrap_self_distill(made)


def test_new_classifiers_have_no_names():
    model = small_model(num_classes=5)
    model.pretrained_cfg["label_names"] = list("abcde")
    model.reset_classifier(5)
    assert "label_names" not in model.pretrained_cfg


def test_feature_maps_are_the_backbones():
    model = small_model().eval()
    x = torch.randn(2, 3, 32, 32)
    for network in (model, model.truncate(-1)):
        final, maps = network.forward_intermediates(x, indices=[1, 2])
        expected = model.backbone.forward_intermediates(x, indices=[1, 2])
        assert torch.equal(final, expected[0])
        assert all(map(torch.equal, maps, expected[1]))
