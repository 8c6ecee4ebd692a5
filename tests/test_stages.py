import pytest
import timm
import torch
from torch import nn

from timm_selfdistill import wrap_self_distill
from timm_selfdistill.stages import Stage, check_timm_classifier, choose_exits, read_stages

from .conftest import small_backbone


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("resnet18", ("layer1", "layer2", "layer3", "layer4")),
        ("convnext_atto", ("stages.0", "stages.1", "stages.2", "stages.3")),
        ("efficientnet_b0", ("blocks.1", "blocks.2", "blocks.4", "blocks.6")),
        ("vit_tiny_patch16_224", ("blocks.2", "blocks.5", "blocks.8", "blocks.11")),
        ("test_vit", ("blocks.1", "blocks.2", "blocks.4", "blocks.5")),
        ("cait_xxs24_224", ("blocks.5", "blocks.11", "blocks.17", "blocks.23")),
        ("vgg11", ("features.4", "features.9", "features.14", "features.20")),  # 20 is but the pooling behind 19
        ("crossvit_tiny_240", ("blocks.0", "blocks.1", "blocks.2")),  # six levels, two of each block
        ("coat_tiny", ("serial_blocks1", "parallel_blocks")),  # three levels of one module
        ("mvitv2_tiny", ("block.0", "block.1", "block.2", "block.3")),  # no names of modules
        ("efficientvit_m0", ("stages.0", "stages.1", "stages.2")),
        ("deit_tiny_distilled_patch16_224", ("blocks.2", "blocks.5", "blocks.8", "blocks.11")),
    ],
)
def test_exits_stand_at_stage_boundaries_by_themselves(name, exits):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert tuple(stage.name for stage in choose_exits(model)) == exits


def test_a_stage_knows_channels_and_reduction():
    stage = read_stages(timm.create_model("resnet18", num_classes=10))[2]
    assert stage == Stage(2, "layer2", 128, 8)


@pytest.mark.parametrize(
    "exits", [[1, 3], ["layer1", "layer3"], [1, "layer3"], (1, 3, 4), ["layer1", "layer3", "layer4"]]
)
def test_exits_by_index_or_name_the_teacher_named_or_not(exits):
    assert wrap_self_distill(small_backbone(), exits=exits).exits == ("layer1", "layer3", "layer4")


@pytest.mark.parametrize(
    ("exits", "error", "message"),
    [
        ([], ValueError, r"exits=\[\] .*choose from 0 \(act1\), 1 \(layer1\)"),
        (["layer4"], ValueError, r"exits=\['layer4'\] .*choose from 0 \(act1\), 1 \(layer1\)"),
        ([9], ValueError, r"ResNet .*level 9 .*choose from 0 \(act1\), 1 \(layer1\)"),
        ([-1], ValueError, "ResNet .*level -1 .*choose from 0"),
        (["layer9"], ValueError, r"ResNet .*level 'layer9' .*choose from 0 \(act1\), 1 \(layer1\)"),
        ([1, 1], ValueError, r"exits=\[1, 1\] .*ascending"),
        ([3, 1], ValueError, r"exits=\[3, 1\] .*ascending"),
        ("layer1", TypeError, "exits .*sequence .*got 'layer1'"),
        (2, TypeError, "exits .*sequence .*got 2"),
        ([1.5], TypeError, "got 1.5"),
        ([True], TypeError, "got True"),
    ],
)
def test_bad_exits_are_refused(exits, error, message):
    with pytest.raises(error, match=message):
        wrap_self_distill(small_backbone(), exits=exits)


def test_a_name_of_several_levels_is_refused():
    with torch.device("meta"):
        model = timm.create_model("crossvit_tiny_240", num_classes=10)
    with pytest.raises(ValueError, match=r"'blocks.1' .*levels \[1, 4\] of CrossVit; .*index"):
        wrap_self_distill(model, exits=["blocks.1"])
    assert wrap_self_distill(model, exits=[1, 4]).exits == ("blocks.1", "blocks.1", "blocks.2")


def test_encoders_are_refused():
    with torch.device("meta"):
        model = timm.create_model("mobilenetv5_300m_enc")
    with pytest.raises(ValueError, match="MobileNetV5Encoder .*num_classes=0.*encoders"):
        wrap_self_distill(model)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), "resnet18", None])
def test_what_is_not_a_timm_model_is_refused(model):
    with pytest.raises(TypeError, match=rf"timm model, got \S*\.{type(model).__name__}\b.*timm\.create_model"):
        check_timm_classifier(model)


def test_feature_only_models_are_refused():
    with pytest.raises(TypeError, match="FeatureListNet.*not features_only"):
        check_timm_classifier(timm.create_model("resnet10t", features_only=True))


def test_models_without_classifier_are_refused():
    with pytest.raises(ValueError, match="ResNet .*num_classes=0.*num_classes=K"):
        check_timm_classifier(timm.create_model("resnet10t", num_classes=0))


def test_a_model_without_a_level_before_its_last_is_refused():
    model = small_backbone()
    model.feature_info = [dict(info, module="layer4") for info in model.feature_info]
    with pytest.raises(ValueError, match=r"ResNet .*level 4 \(layer4\); .*exits="):
        wrap_self_distill(model)
