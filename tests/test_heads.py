import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_selfdistill import wrap_self_distill
from timm_selfdistill.heads import BottleneckHead, LinearHead, create_head
from timm_selfdistill.stages import Stage

STAGE, TEACHER = Stage(1, "layer1", 64, 4), Stage(4, "layer4", 512, 32)


def forward_flops(model: nn.Module, size: int, call) -> int:
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        call(model, torch.randn(1, 3, size, size))
    return flops.get_total_flops()


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(("name", "limit"), [("resnet18", 0.048), ("resnet50", 0.15)])
def test_all_heads_together_cost_little(name, limit, size):
    model = wrap_self_distill(timm.create_model(name, num_classes=100)).eval()
    plain = forward_flops(model, size, lambda m, x: m.backbone(x))
    everything = forward_flops(model, size, lambda m, x: m.forward_exits(x))
    assert 1 < everything / plain <= 1 + limit


def test_all_heads_together_cost_little_in_the_resnet_for_cifar():
    backbone = timm.create_model("resnet18", num_classes=100)
    backbone.conv1, backbone.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model = wrap_self_distill(backbone).eval()
    plain = forward_flops(model, 32, lambda m, x: m.backbone(x))
    assert 1 < forward_flops(model, 32, lambda m, x: m.forward_exits(x)) / plain <= 1.048


@pytest.mark.parametrize("head", ["bottleneck", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (65, 224), (224, 224), (100, 36)])
def test_features_have_the_teachers_shape_at_any_size(head, size):
    model = wrap_self_distill(timm.create_model("resnet10t", num_classes=7), head=head)
    output = model.forward_exits(torch.randn(2, 3, *size))
    assert {feature.shape for feature in output.features} == {output.features[-1].shape}
    assert {tuple(logits.shape) for logits in output.logits} == {(2, 7)}


def test_a_bottleneck_head_halves_down_to_the_teacher():
    head = BottleneckHead(STAGE, TEACHER, 10)
    logits, feature = head(torch.randn(2, 64, 56, 56))
    assert logits.shape == (2, 10)
    assert feature.shape == (2, 512, 7, 7)
    widths = [layer.conv.out_channels for layer in head.bottleneck]
    assert widths == [32, 64, 128, 512]


def test_a_bottleneck_head_rounds_odd_sizes_up():
    assert BottleneckHead(STAGE, TEACHER, 10)(torch.randn(2, 64, 9, 17))[1].shape == (2, 512, 2, 3)


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


@pytest.mark.parametrize(("head", "head_args", "error", "message"), [
    ("foo", None, ValueError, "unknown head 'foo'; choose from bottleneck, linear"),
    (3, None, TypeError, "a callable, got 3"),
    ("linear", {"width": 3}, TypeError, r"'linear' does not take head_args=\{'width': 3\}"),
    ("bottleneck", {"width": 0}, ValueError, "width must be at least 1 channel, got 0"),
])
def test_bad_heads_are_refused(head, head_args, error, message):
    with pytest.raises(error, match=message):
        create_head(head, STAGE, TEACHER, 10, head_args)
