"""The networks for CIFAR behave as every timm model does, and have the published sizes."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import create_conv2d
from timm.models.resnetv2 import DownsampleConv, PreActBasic
from torch import nn

from timm_selfdistill import wrap_self_distill
from timm_selfdistill.models.cifar_resnetv2 import CifarResNetV2, PyramidBottleneck

ALL = [
    "cifar_pyramidnet101_240",
    "cifar_resnet101",
    "cifar_resnet152",
    "cifar_resnet18",
    "cifar_resnet50",
    "cifar_resnext29_8x64d",
    "cifar_vgg19_bn",
    "cifar_wide_resnet20_8",
    "cifar_wide_resnet28_12",
    "cifar_wide_resnet44_8",
]
KINDS = [
    "cifar_resnet18",
    "cifar_wide_resnet20_8",
    "cifar_resnext29_8x64d",
    "cifar_pyramidnet101_240",
    "cifar_vgg19_bn",
]


def create(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, **kwargs)


def params(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def test_timm_lists_them():
    assert sorted(timm.list_models("cifar_*")) == ALL
    assert timm.list_models("cifar_*", pretrained=True) == []


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("cifar_resnet18", 100, 11.2),  # github.com/weiaicunzai/pytorch-cifar100, as the next three
        ("cifar_resnet50", 100, 23.7),
        ("cifar_resnet101", 100, 42.7),
        ("cifar_resnet152", 100, 58.3),
        ("cifar_wide_resnet28_12", 10, 52.5),  # arXiv:1605.07146, table 4
        ("cifar_resnext29_8x64d", 10, 34.4),  # arXiv:1611.05431, table 7
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes, millions):
    digits = len(str(millions).split(".")[1])
    assert round(params(create(name, num_classes=classes)), digits) == millions


def wide(depth: int, width: int, num_classes: int) -> nn.Module:
    """WideResNet-depth-width of arXiv:1605.07146, table 1, its blocks dealt to three groups, the last first."""
    blocks = (depth - 4) // 2
    depths = [blocks // 3, (blocks + 1) // 3, (blocks + 2) // 3]
    channels = [16 * width] * depths[0] + [32 * width] * depths[1] + [64 * width] * depths[2]
    block = partial(PreActBasic, proj_layer=DownsampleConv, conv_layer=create_conv2d)
    return CifarResNetV2(block, depths, channels, num_classes=num_classes)


def pyramid(depth: int, alpha: int, num_classes: int) -> nn.Module:
    """PyramidNet with bottlenecks of arXiv:1610.02915, equation 3."""
    blocks = (depth - 2) // 3
    channels = [4 * round(16 + alpha * block / blocks) for block in range(1, blocks + 1)]
    return CifarResNetV2(PyramidBottleneck, [blocks // 3] * 3, channels, stem_norm=True, num_classes=num_classes)


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(28, 10, 36.5), (22, 8, 17.2), (16, 8, 11.0), (40, 4, 8.9)]
)  # arXiv:1605.07146, tables 4 and 5
def test_the_family_of_wide_resnets_has_the_published_parameter_counts(depth, width, millions):
    assert round(params(wide(depth, width, num_classes=10)), 1) == millions


@pytest.mark.parametrize(
    ("depth", "alpha", "millions"), [(164, 270, 27.0), (200, 240, 26.6), (236, 220, 26.8), (272, 200, 26.0)]
)  # github.com/jhkim89/PyramidNet
def test_the_family_of_pyramidnets_has_the_published_parameter_counts(depth, alpha, millions):
    with torch.device("meta"):
        model = pyramid(depth, alpha, num_classes=10)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert weights / 1e6 == pytest.approx(millions, abs=0.06)  # published without the norms' parameters


@pytest.mark.parametrize(
    ("name", "family", "size"),
    [
        ("cifar_wide_resnet20_8", wide, (20, 8)),
        ("cifar_wide_resnet44_8", wide, (44, 8)),
        ("cifar_wide_resnet28_12", wide, (28, 12)),
        ("cifar_pyramidnet101_240", pyramid, (101, 240)),
    ],
)
def test_networks_are_those_of_their_family(name, family, size):
    with torch.device("meta"):
        networks = create(name), family(*size, num_classes=100)
    first, second = ({key: value.shape for key, value in model.state_dict().items()} for model in networks)
    assert first == second
    assert repr(networks[0]) == repr(networks[1])


def test_vgg_has_the_convolutions_of_configuration_e_and_its_two_hidden_layers():
    model = create("cifar_vgg19_bn")
    convs = sum(p.numel() for module in model.features if isinstance(module, nn.Conv2d) for p in module.parameters())
    torchvision_vgg19 = 143_667_240  # of torchvision's table: 16 convolutions, and 3 layers of 102.76, 16.78 and 4.10 M
    assert convs == torchvision_vgg19 - (512 * 49 * 4096 + 4096) - (4096 * 4096 + 4096) - (4096 * 1000 + 1000)
    assert [m.out_channels for m in model.pre_logits.modules() if isinstance(m, nn.Conv2d)] == [4096, 4096]
    assert round(params(model), 2) == 39.33


def test_resnet18_has_11_22_million_parameters():
    assert params(create("cifar_resnet18")) == 11.220132


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("cifar_wide_resnet20_8", [2, 3, 1, 2]),
        ("cifar_wide_resnet44_8", [6, 7, 2, 5]),
        ("cifar_wide_resnet28_12", [4, 4, 1, 3]),
        ("cifar_resnext29_8x64d", [3, 3, 1, 2]),
        ("cifar_pyramidnet101_240", [11, 11, 3, 8]),
    ],
)
def test_three_groups_are_cut_into_four_sections(name, sections):
    with torch.device("meta"):
        model = create(name)
    assert [len(stage.blocks) for stage in model.stages] == sections


@pytest.mark.parametrize("name", ALL)
def test_each_has_four_classifiers_at_the_ends_of_its_sections(name):
    with torch.device("meta"):
        model = wrap_self_distill(create(name))
        output = model.forward_exits(torch.empty(2, 3, 32, 32))
    by_group = tuple(f"stages.{index}" for index in range(4))
    names = {
        "CifarResNet": ("layer1", "layer2", "layer3", "layer4"),
        "CifarResNetV2": by_group,
        "CifarVGG": ("features.12", "features.25", "features.38", "features.52"),
    }[type(model.backbone).__name__]
    assert model.exits == names
    assert [tuple(logits.shape) for logits in output.logits] == [(2, 100)] * 4


@pytest.mark.parametrize("name", KINDS)
def test_forward_and_backward(name):
    model = create(name, num_classes=42, in_chans=1).train()
    model(torch.randn(2, 1, 32, 32)).mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 42)


@pytest.mark.parametrize("name", KINDS)
def test_layers_can_be_chosen_as_in_timms_models(name):
    norm = nn.InstanceNorm2d if name in ("cifar_resnet18", "cifar_vgg19_bn") else "layernorm2d"
    model = create(name, act_layer=nn.SiLU, norm_layer=norm)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "SiLU" in kinds
    assert not kinds & {"ReLU", "BatchNorm2d", "BatchNormAct2d"}


def test_images_are_normalised_as_cifar100s():
    cfg = create("cifar_resnet18").default_cfg
    assert (cfg["mean"], cfg["std"]) == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))  # of its training images


@pytest.mark.parametrize("name", KINDS)
def test_convolutions_start_with_hes_distribution(name):
    for module in create(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 3000 and module.bias is None:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
    stem = create("cifar_resnet18").conv1.weight
    assert stem.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.15)


def test_the_dropout_of_vgg_is_its_papers_unless_told_otherwise():
    def rates(**kwargs) -> set[float]:
        return {module.p for module in create("cifar_vgg19_bn", **kwargs).modules() if isinstance(module, nn.Dropout)}

    assert rates() == {0.5}
    assert rates(drop_rate=0.0) == {0.0}


def test_pyramidnets_stem_has_a_norm_and_no_activation():
    stem = create("cifar_pyramidnet101_240").stem
    assert [type(module).__name__ for module in stem] == ["Conv2d", "BatchNormAct2d"]
    x = torch.randn(1, 3, 32, 32)
    assert stem.eval()(x).min() < 0


@pytest.mark.parametrize("name", KINDS)
def test_the_default_cfg_fits_the_network(name):
    model = create(name).eval()
    cfg = model.default_cfg
    assert (cfg["num_classes"], cfg["input_size"], cfg["crop_pct"]) == (100, (3, 32, 32), 1.0)
    assert f"{cfg['classifier']}.weight" in model.state_dict()
    assert f"{cfg['first_conv']}.weight" in model.state_dict()
    assert model.state_dict()[f"{cfg['classifier']}.weight"].shape[0] == 100
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, *cfg["input_size"]))
    assert tuple(features.shape) == (1, model.num_features, *cfg["pool_size"])


@pytest.mark.parametrize("name", KINDS)
def test_the_classifier_can_be_reset_and_dropped(name):
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model = create(name).eval()
        assert model.get_classifier().weight.shape[0] == 100
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(7)
        assert model.eval()(x).shape == (1, 7)
        model.reset_classifier(0)
        assert torch.equal(model.eval()(x), pooled)
        model.reset_classifier(0, "")
        assert model.eval()(x).ndim == 4
        headless = create(name, num_classes=0).eval()
        assert headless(x).shape == (1, headless.head_hidden_size)


@pytest.mark.parametrize("name", KINDS)
def test_features_are_those_of_feature_info(name):
    x = torch.randn(1, 3, 32, 32)
    features_only = create(name, features_only=True).eval()
    info = features_only.feature_info
    model = create(name).eval()
    with torch.no_grad():
        maps = features_only(x)
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(model.forward_head(final), model(x))
        early = model.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)
    assert len(maps) == len(intermediates) == len(model.feature_info)
    for feature_map, intermediate, channels, reduction in zip(maps, intermediates, info.channels(), info.reduction()):
        assert feature_map.shape == intermediate.shape == (1, channels, 32 // reduction, 32 // reduction)
    assert torch.equal(early[0], intermediates[2])
    for level in model.feature_info:
        model.get_submodule(level["module"])


@pytest.mark.parametrize("name", KINDS)
def test_layers_behind_a_level_can_be_pruned(name):
    model = create(name).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        model.prune_intermediate_layers([2])
        assert torch.equal(model.forward_intermediates(x, indices=[2], intermediates_only=True)[0], expected)
    assert params(model) < 0.6 * params(create(name))


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_wide_resnet20_8"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    torch.manual_seed(0)
    model, x = create(name).train(), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(plain, checkpointed)


def test_stochastic_depth_grows_with_the_blocks():
    model = create("cifar_wide_resnet20_8", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * index for index in range(8)])
