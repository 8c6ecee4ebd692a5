import copy

import pytest
import timm
import torch
from torch import nn

from timm_selfdistill import SelfDistillLoss, SelfDistillModel, SelfDistillOutput, wrap_self_distill
from timm_selfdistill.heads import LinearHead

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
    with pytest.raises(ValueError, match=f"exit .*0 to 3, -1 to -4 or 'ensemble', got {exit!r}"):
        small_model().eval().predict(torch.randn(IMAGES), exit)


def test_the_backbone_is_the_same_object_with_the_same_weights():
    backbone = small_backbone()
    before = copy.deepcopy(backbone.state_dict())
    model = wrap_self_distill(backbone)
    assert model.backbone is backbone
    assert model.strip() is backbone
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert list(before) == list(backbone.state_dict())


def test_nothing_is_left_on_the_backbone():
    backbone = small_backbone()
    before = [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in backbone.named_modules()
    ]
    keys = set(vars(backbone))
    model = wrap_self_distill(backbone)
    model.train()(torch.randn(IMAGES)).logits[0].sum().backward()
    model.eval().predict(torch.randn(IMAGES), 0)
    assert model.strip() is backbone
    assert set(vars(backbone)) == keys
    assert [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in backbone.named_modules()
    ] == before


def test_wrapping_runs_nothing(monkeypatch):
    backbone = small_backbone()
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("wrapping ran a module"))
    wrap_self_distill(backbone)


def test_weights_loaded_before_wrapping_stay():
    weights = {
        key: torch.randn_like(value) if value.is_floating_point() else value
        for key, value in small_backbone().state_dict().items()
    }
    backbone = small_backbone()
    backbone.load_state_dict(weights)
    model = wrap_self_distill(backbone)
    assert all(torch.equal(model.state_dict()[f"backbone.{key}"], value) for key, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channels_last_model_of_any_dtype_trains(dtype):
    backbone = small_backbone().to(dtype).to(memory_format=torch.channels_last)
    model = wrap_self_distill(backbone).train()
    output = model(torch.randn(IMAGES, dtype=dtype).to(memory_format=torch.channels_last))
    assert {logits.dtype for logits in output.logits} == {dtype}
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in output.features)
    loss = SelfDistillLoss()(output, torch.tensor([0, 1]))
    assert loss.dtype == torch.float32
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_gradient_checkpointing_saves_activations_and_gives_the_same_gradients(name):
    def step(enable: bool) -> tuple[int, list[torch.Tensor]]:
        saved = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor

        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = SelfDistillLoss()(model(x), torch.tensor([0, 1]))
        loss.backward()
        return sum(saved), [p.grad.clone() for p in model.parameters()]

    backbone, x = family(name)
    model = wrap_self_distill(backbone).train()
    memory, gradients = step(False)
    less_memory, same_gradients = step(True)
    assert less_memory < 0.7 * memory
    for first, second in zip(gradients, same_gradients):
        torch.testing.assert_close(first, second)


def test_frozen_parts_of_the_backbone_stay_frozen():
    backbone = small_backbone()
    backbone.layer1.requires_grad_(False)
    before = copy.deepcopy(backbone.state_dict())
    model = wrap_self_distill(backbone).train()
    SelfDistillLoss()(model(torch.randn(IMAGES)), torch.tensor([0, 1])).backward()
    torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1).step()
    after, frozen = backbone.state_dict(), ("layer1.0.conv1.weight", "layer1.0.bn1.bias")
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert all(backbone.get_parameter(key).grad is None for key in frozen)
    assert not torch.equal(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])


def test_heads_follow_dtype_memory_format_and_mode():
    backbone = small_backbone().to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    model = wrap_self_distill(backbone)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for head in model.heads:
        weight = head.bottleneck[1].weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert wrap_self_distill(small_backbone().train()).heads.training


@pytest.mark.parametrize("head", ["bottleneck", "attention", "linear", LinearHead])
def test_features_may_be_left_out(head):
    model, x = small_model(head=head), torch.randn(IMAGES)
    for mode in (True, False):
        model.train(mode)
        output, without = (model.forward_exits(x, with_features) for with_features in (True, False))
        assert without.features == ()
        assert all(torch.equal(one, other) for one, other in zip(output.logits, without.logits, strict=True))
    assert model.train()(x, with_features=False).features == ()


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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_model_and_loss_compile_to_one_graph_with_the_eager_gradients(backend):
    model, criterion = small_model().train(), SelfDistillLoss()
    x, y = torch.randn(IMAGES), torch.tensor([0, 1])
    plain = copy.deepcopy(model)
    loss = torch.compile(lambda x, y: criterion(model(x), y), fullgraph=True, backend=backend)(x, y)
    loss.backward()
    expected = criterion(plain(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vit_tiny_patch16_224", (2, 3, 96, 96), r"VisionTransformer .*224x224 .*got 96x96; .*img_size=\(96, 96\)"),
        ("test_resnet", (2, 1, 64, 64), r"ResNet .*\(B, 3, H, W\), got \(2, 1, 64, 64\)"),
        ("test_resnet", (3, 64, 64), r"ResNet .*\(B, 3, H, W\), got \(3, 64, 64\)"),
    ],
)
def test_images_of_a_wrong_shape_are_refused(name, shape, message):
    model = small_model(name)
    x = torch.randn(shape)
    for call in (model.train(), model.eval(), lambda x: model.predict(x, 0), lambda x: model.predict(x, -1)):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_errors_that_are_not_the_images_fault_stay_what_they_are():
    model = small_model()
    model.backbone.layer2.register_forward_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        model(torch.randn(IMAGES))


def test_a_model_that_gives_two_logits_in_training_is_refused():
    backbone = small_backbone("deit_tiny_distilled_patch16_224")
    model = wrap_self_distill(backbone)
    x = torch.randn(2, 3, 224, 224)
    assert model.train()(x).logits[-1].shape == (2, 10)
    backbone.set_distilled_training(True)
    with pytest.raises(TypeError, match=r"VisionTransformerDistilled gives 2 logits.*set_distilled_training\(False\)"):
        model(x)


class OwnHead(nn.Module):
    """Returns logits and feature of given shapes."""

    def __init__(self, stage, teacher, num_classes, logits, feature):
        super().__init__()
        self.shapes = logits, feature
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        logits, feature = (shape and self.scale * torch.zeros(shape) for shape in self.shapes)
        return (logits, feature) if feature is not None else logits


@pytest.mark.parametrize(
    ("logits", "feature"),
    [((2, 7), (2, 96, 2, 2)), ((2, 10), (2, 95, 2, 2)), ((2, 10), (2, 96)), ((2, 10), None), ((1, 10), (2, 96, 2, 2))],
)
def test_a_head_of_another_shape_than_the_teachers_is_refused(logits, feature):
    model = small_model(head=OwnHead, head_args={"logits": logits, "feature": feature})
    x = torch.randn(IMAGES)
    for call in (lambda x: model.train()(x), model.forward_exits, lambda x: model.predict(x, 0)):
        with pytest.raises(ValueError, match=r"head of ResNet .*layer1.*\(2, 10\) .*\(2, 96, H, W\), got .*callable"):
            call(x)


def test_a_backbone_whose_logits_changed_is_named_instead_of_the_head():
    model = small_model().train()
    model.backbone.reset_classifier(5)
    with pytest.raises(ValueError, match=r"ResNet .*\(2, 5\), expected \(2, 10\); .*reset_classifier"):
        model(torch.randn(IMAGES))


@pytest.mark.parametrize("argument", ["head_args", "model_args"])
def test_arguments_that_must_be_dicts(argument):
    with pytest.raises(TypeError, match=rf"{argument} .*dict, got \[1\]"):
        small_model(**{argument: [1]})


@pytest.mark.parametrize(
    ("name", "size"), [pytest.param("coat_tiny", 64, marks=pytest.mark.slow), ("visformer_tiny", (64, 96))]
)
def test_a_model_made_for_another_image_size(name, size, tmp_path):
    backbone = timm.create_model(name, num_classes=10, img_size=size)
    model = wrap_self_distill(backbone, model_args={"img_size": size}).eval()
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(1, 3, height, width)
    model.summary()
    model.save_pretrained(tmp_path)
    loaded = SelfDistillModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert loaded.summary() == model.summary()
    with pytest.raises(ValueError, match=f"{height}x{width} .*got 33x33"):
        loaded(torch.randn(1, 3, 33, 33))


def test_a_compiled_network_is_refused():
    with pytest.raises(TypeError, match=r"compile last: torch.compile\(wrap_self_distill\(model\)\)"):
        wrap_self_distill(torch.compile(small_backbone(), backend="eager"))
    compiled = torch.compile(small_model(), backend="eager").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(compiled(x), compiled._orig_mod(x))
