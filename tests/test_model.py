import copy

import pytest
import timm
import torch
from torch import nn

from timm_selfdistill import SelfDistillLoss, SelfDistillOutput, wrap_self_distill

from .conftest import small_backbone, small_model

IMAGES = (2, 3, 64, 64)
FAMILIES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet", "test_mambaout"]


def family(name: str) -> tuple[nn.Module, torch.Tensor]:
    backbone = small_backbone(name)
    return backbone, torch.randn(2, *backbone.pretrained_cfg["input_size"])


@pytest.mark.parametrize("name", FAMILIES)
def test_training_gives_all_exits_and_eval_the_backbones_logits_to_the_bit(name):
    backbone, x = family(name)
    model = wrap_self_distill(copy.deepcopy(backbone))
    output = model.train()(x)
    assert isinstance(output, SelfDistillOutput)
    assert len(output.logits) == len(output.features) == len(model.exits) == len(model.heads) + 1
    assert {tuple(logits.shape) for logits in output.logits} == {(2, 10)}
    assert {feature.shape for feature in output.features} == {output.features[-1].shape}

    model = wrap_self_distill(backbone).eval()
    with torch.no_grad():
        assert torch.equal(model(x), backbone(x))
        assert torch.equal(model.forward_exits(x).logits[-1], backbone(x))


def test_eval_forward_runs_no_head():
    model = small_model().eval()
    called = []
    for head in model.heads:
        head.register_forward_hook(lambda *_: called.append(1))
    model(torch.randn(IMAGES))
    assert not called
    model.forward_exits(torch.randn(IMAGES))
    assert len(called) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_predict_gives_the_logits_of_one_exit(name):
    backbone, x = family(name)
    model = wrap_self_distill(backbone).eval()
    with torch.no_grad():
        logits = model.forward_exits(x).logits
        for exit in range(-len(logits), len(logits)):
            torch.testing.assert_close(model.predict(x, exit), logits[exit], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.predict(x, "ensemble"), torch.stack(logits).mean(0), atol=1e-5, rtol=1e-5)
        assert torch.equal(model.predict(x), backbone(x))


def test_predict_runs_no_layer_behind_its_exit():
    model = small_model().eval()
    ran = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        model.backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model.predict(torch.randn(IMAGES), 1)
    assert ran == ["layer1", "layer2"]


@pytest.mark.parametrize("exit", [4, -5, "last", 1.0, True, None])
def test_predict_refuses_an_exit_that_does_not_exist(exit):
    with pytest.raises(ValueError, match="exit must be 0 to 3, -1 to -4 or 'ensemble', got"):
        small_model().eval().predict(torch.randn(IMAGES), exit)


def test_the_backbone_is_the_same_object_with_the_same_weights():
    backbone = small_backbone()
    before = copy.deepcopy(backbone.state_dict())
    model = wrap_self_distill(backbone)
    assert model.backbone is backbone
    assert model.strip() is backbone
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert list(before) == list(backbone.state_dict())


def test_heads_follow_dtype_memory_format_and_mode():
    backbone = small_backbone().to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    model = wrap_self_distill(backbone)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for head in model.heads:
        weight = head.bottleneck[0].conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert wrap_self_distill(small_backbone().train()).heads.training


def test_heads_follow_the_device():
    with torch.device("meta"):
        backbone = small_backbone()
    model = wrap_self_distill(backbone)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.train()(torch.empty(IMAGES, device="meta")).logits[0].shape == (2, 10)


def test_part_of_a_backbone_in_another_mode_stays_so():
    backbone = small_backbone().train()
    backbone.layer1.eval()
    model = wrap_self_distill(backbone)
    assert model.training
    assert not model.backbone.layer1.training


def test_a_frozen_backbone_stays_as_it_is_to_the_bit():
    backbone = small_backbone()
    before = copy.deepcopy(backbone.state_dict())
    model = wrap_self_distill(backbone, freeze_backbone=True).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    heads = copy.deepcopy(model.heads.state_dict())
    for _ in range(2):
        SelfDistillLoss()(model(torch.randn(IMAGES)), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert not backbone.training
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not all(torch.equal(heads[key], value) for key, value in model.heads.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


def test_compiles_to_one_graph_and_trains_a_step():
    model = small_model().train()
    criterion = SelfDistillLoss()
    x, y = torch.randn(IMAGES), torch.tensor([0, 1])
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    loss = criterion(compiled(x), y)
    loss.backward()
    expected = criterion(plain(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-4)


def test_loss_and_model_compile_together():
    model, criterion = small_model().train(), SelfDistillLoss()
    step = torch.compile(lambda x, y: criterion(model(x), y), fullgraph=True)
    step(torch.randn(IMAGES), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_grey_channel():
    model = small_model(in_chans=1).train()
    assert model(torch.randn(2, 1, 32, 32)).logits[0].shape == (2, 10)


def test_weight_decay_exemptions_of_the_backbone_are_handed_on():
    backbone = timm.create_model("test_vit", num_classes=10)
    assert wrap_self_distill(backbone).no_weight_decay() == {f"backbone.{name}" for name in backbone.no_weight_decay()}
    assert small_model().no_weight_decay() == set()


def test_a_seed_makes_the_heads_repeatable():
    def heads():
        torch.manual_seed(3)
        return small_model().heads.state_dict()

    first, second = heads(), heads()
    assert all(torch.equal(first[key], second[key]) for key in first)
