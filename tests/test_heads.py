import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_selfdistill import wrap_self_distill
from timm_selfdistill.heads import AttentionHead, BottleneckHead, LinearHead, batch_norm, create_head
from timm_selfdistill.stages import Stage

STAGE, TEACHER = Stage(1, "layer1", 64, 4), Stage(4, "layer4", 512, 32)


def forward_flops(model: nn.Module, size: int, call) -> int:
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        call(model, torch.randn(1, 3, size, size))
    return flops.get_total_flops()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("resnet18", 224),
        ("resnet50", 32),
        ("resnet50", 224),
        ("cifar_resnet18", 32),
        ("cifar_resnet50", 32),
    ],
)
@pytest.mark.parametrize("head", ["bottleneck", "attention"])
def test_all_heads_together_cost_less_than_the_authors(head, name, size):
    limit = 0.025 if "18" in name else 0.045  # the authors' cost ResNet18 4.8 % and ResNet50 31.5 %
    model = wrap_self_distill(timm.create_model(name, num_classes=100), head=head).eval()
    plain = forward_flops(model, size, lambda m, x: m.backbone(x))
    everything = forward_flops(model, size, lambda m, x: m.forward_exits(x))
    assert 1 < everything / plain <= 1 + limit


@pytest.mark.parametrize("head", ["bottleneck", "attention", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 224), (224, 224), (100, 36)])
def test_features_have_the_teachers_shape_at_any_size(head, size):
    model = wrap_self_distill(timm.create_model("resnet10t", num_classes=7), head=head)
    output = model.forward_exits(torch.randn(2, 3, *size))
    assert {feature.shape for feature in output.features} == {output.features[-1].shape}
    assert {tuple(logits.shape) for logits in output.logits} == {(2, 7)}


def test_a_bottleneck_head_pools_to_the_teachers_resolution_at_once():
    head = BottleneckHead(STAGE, TEACHER, 10)
    logits, feature = head(torch.randn(2, 64, 56, 56))
    assert logits.shape == (2, 10)
    assert feature.shape == (2, 512, 7, 7)
    pool, narrow, *_ = head.bottleneck
    assert (pool.groups, pool.kernel_size, pool.stride) == (64, (8, 8), (8, 8))
    assert (narrow.out_channels, head.proj.out_channels) == (256, 512)
    assert isinstance(BottleneckHead(TEACHER, TEACHER, 10).bottleneck[0], nn.Identity)


def test_a_bottleneck_head_rounds_sizes_up_and_fills_with_zeros():
    head = BottleneckHead(STAGE, TEACHER, 10).eval()
    x = torch.randn(2, 64, 9, 17)
    logits, feature = head(x)
    assert feature.shape == (2, 512, 2, 3)
    torch.testing.assert_close(head(nn.functional.pad(x, (4, 3, 4, 3)))[0], logits)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_is_torchs_without_the_count(momentum):
    norm, torchs = (nn.BatchNorm2d(8, momentum=momentum) for _ in range(2))
    for x in torch.randn(3, 4, 8, 5, 5):
        assert torch.equal(batch_norm(norm, x), torchs(x))
    assert torch.equal(norm.running_mean, torchs.running_mean)
    assert torch.equal(norm.running_var, torchs.running_var)
    assert torch.equal(batch_norm(norm.eval(), x), torchs.eval()(x))
    assert norm.num_batches_tracked == (0 if momentum else 3)


def test_a_head_with_a_forward_of_its_own_runs_that():
    class Own(LinearHead):
        def forward(self, x):
            logits, feature = super().forward(x)
            return logits + 1, feature

    model, x = wrap_self_distill(timm.create_model("test_resnet", num_classes=4), head=Own), torch.randn(2, 3, 64, 64)
    expected = model.forward_exits(x).logits[0]
    assert torch.equal(model.predict(x, 0), expected)
    assert torch.equal(model.forward_exits(x, with_features=False).logits[0], expected)


def test_an_attention_head_sees_the_feature_through_a_mask():
    head = AttentionHead(STAGE, TEACHER, 10).eval()
    x = torch.randn(2, 64, 15, 14)
    seen = []
    head.bottleneck[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits, feature = head(x)
    assert (logits.shape, feature.shape) == ((2, 10), (2, 512, 2, 2))
    mask = seen[0] / x
    assert mask.shape == x.shape
    assert 0 < mask.min() < mask.max() < 1
    nn.init.constant_(head.attention[-1].bias, -50.0)  # a mask of zeros hides everything
    nn.init.zeros_(head.attention[-1].weight)
    assert torch.equal(head(x)[0], head(torch.zeros_like(x))[0])


@pytest.mark.parametrize("head", [BottleneckHead, AttentionHead, LinearHead])
def test_convolutions_start_with_hes_distribution_over_their_outputs(head):
    for module in head(STAGE, TEACHER, 10).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels // module.groups * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize("head", [BottleneckHead, AttentionHead, LinearHead])
def test_the_pooled_feature_is_the_mean_of_the_feature(head):
    head, x = head(STAGE, TEACHER, 10), torch.randn(2, 64, 17, 24)
    for mode in (True, False):
        logits, feature = head.train(mode)(x)
        without, pooled = head(x, with_feature=False)
        assert torch.equal(without, logits)
        torch.testing.assert_close(pooled, feature.mean((2, 3)))


def test_hooks_on_heads_are_called():
    model, calls = wrap_self_distill(timm.create_model("test_resnet", num_classes=4)), []
    model.heads[0].register_forward_hook(lambda head, inputs, output: calls.append(output[0]))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.predict(x, 0), calls[0])
    model.train()(x, with_features=False)
    assert len(calls) == 2


def test_a_linear_heads_logits_are_linear_in_the_pooled_map():
    head = LinearHead(STAGE, TEACHER, 10).eval()
    a, b, zero = torch.randn(1, 64, 8, 8), torch.randn(1, 64, 8, 8), torch.zeros(1, 64, 8, 8)
    bias = head(zero)[0]
    torch.testing.assert_close(head(a + b)[0] - bias, head(a)[0] - bias + head(b)[0] - bias, atol=1e-5, rtol=1e-4)
    pooled = a.mean((2, 3), keepdim=True).expand(1, 64, 8, 8)
    torch.testing.assert_close(head(pooled)[0], head(a)[0], atol=1e-5, rtol=1e-4)


def test_a_callable_makes_heads_of_ones_own():
    class Own(nn.Module):
        def __init__(self, stage, teacher, num_classes, hidden):
            super().__init__()
            self.proj = nn.Conv2d(stage.channels, teacher.channels, 1)
            self.fc = nn.Sequential(nn.Linear(teacher.channels, hidden), nn.Linear(hidden, num_classes))

        def forward(self, x):
            feature = self.proj(x)
            return self.fc(feature.mean((2, 3))), feature

    model = wrap_self_distill(timm.create_model("test_resnet", num_classes=4), head=Own, head_args={"hidden": 5})
    output = model.forward_exits(torch.randn(2, 3, 64, 64))
    assert [tuple(logits.shape) for logits in output.logits] == [(2, 4)] * 4
    assert len({feature.shape for feature in output.features}) == 1


@pytest.mark.parametrize(
    ("head", "head_args", "error", "message"),
    [
        ("foo", None, ValueError, "unknown head 'foo'; .*bottleneck, attention, linear"),
        (3, None, TypeError, "bottleneck, attention, linear .*callable .*got int"),
        (
            "linear",
            {"width": 3},
            TypeError,
            r"'linear' of ResNet .*level 1 \(layer1\) .*head_args=\{'width': 3\}: .* none$",
        ),
        ("attention", {"widht": 3}, TypeError, r"'widht'; .* width$"),
        ("bottleneck", {"width": 0}, ValueError, r"width .*1, got 0 \(level 1 \(layer1\)\)"),
        ("attention", {"width": 6.5}, ValueError, "width .*channels.* 1, got 6.5"),
        ("attention", {"width": "64"}, ValueError, "width .*channels.* 1, got '64'"),
        ("bottleneck", {"width": True}, ValueError, "width .*got True"),
        (nn.Linear(3, 3), None, TypeError, "bottleneck, attention, linear .*callable .*got Linear"),
        (max, None, TypeError, r"ResNet .*level 1 \(layer1\) .*\(stage, teacher, num_classes\)"),
        (lambda stage, teacher: None, None, TypeError, r"\(stage, teacher, num_classes\) .* none$"),
        (lambda *_: None, None, TypeError, r"ResNet .*level 1 \(layer1\) .*module, .*NoneType"),
    ],
)
def test_bad_heads_are_refused(head, head_args, error, message):
    with pytest.raises(error, match=message):
        create_head(head, STAGE, TEACHER, 10, head_args, "ResNet")
