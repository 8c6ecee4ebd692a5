import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_selfdistill import cost, wrap_self_distill
from timm_selfdistill.cost import count_cost, default_input_size, measure_speedups, memory_per_image

from .conftest import small_model


def test_multiply_adds_are_half_of_what_torch_counts():
    model = timm.create_model("resnet18", num_classes=10).eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert count_cost(model, (3, 64, 64)).macs == flops.get_total_flops() // 2


def test_the_summary_of_resnet18():
    model = wrap_self_distill(timm.create_model("resnet18", num_classes=1000))
    rows = model.summary()
    assert [row.exit for row in rows] == [0, 1, 2, 3, "ensemble"]
    assert [row.module for row in rows] == ["layer1", "layer2", "layer3", "layer4", "layer4"]
    assert rows[0].feature_shape == (64, 56, 56)
    assert rows[3].feature_shape == (512, 7, 7)
    assert rows[3].params == 11_689_512  # the published size of ResNet18
    assert round(rows[3].macs / 1e9, 2) == 1.81  # and its published cost
    assert rows[3].share == 1
    assert rows[0].share < rows[1].share < rows[2].share < 1 < rows[4].share < 1.048
    assert rows[4].params == sum(p.numel() for p in model.parameters())


def test_counting_leaves_no_trace():
    model = small_model().train()
    model.backbone.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.summary((3, 64, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.backbone.layer2.training
    assert not model.backbone.layer1.training


def test_default_input_size_knows_the_channels():
    assert default_input_size(timm.create_model("resnet18", in_chans=1)) == (1, 224, 224)
    assert default_input_size(timm.create_model("test_vit")) == (3, 160, 160)


def test_speed_ups_are_ratios_of_medians_to_the_reference_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def lasting(seconds):
        def call(x):
            now[0] += seconds

        return call

    reference, x = lasting(4.0), torch.zeros(1)
    assert measure_speedups(torch.nn.Identity(), reference, [reference, lasting(1.0), lasting(8.0)], x) == [1, 4, 0.5]
    for seconds, rounds in ((0, 1), (20, 2), (10**6, 15)):  # each of 8 s, after one for warming up
        began = now[0]
        measure_speedups(torch.nn.Identity(), reference, [reference], x, seconds=seconds)
        assert now[0] - began == 8 * (1 + rounds)


def test_counting_gives_back_tensors_that_modules_share():
    model = timm.create_model("coat_tiny", num_classes=10)  # its three mlps of a block are one module with three names
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost = count_cost(model, (3, 224, 224))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert cost.params == sum(p.numel() for p in model.parameters())


def test_a_tensor_that_two_modules_share_counts_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Flatten(1), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    cost = count_cost(model, (1, 1, 8))
    assert (cost.params, cost.macs) == (64, 128)
    assert model[2].weight is model[0].weight


class LooksAtValues(nn.Module):
    def __init__(self, look):
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)
        self.look = look

    def forward(self, x):
        self.look(x)
        return self.fc(x)


@pytest.mark.parametrize("look", [Tensor.tolist, Tensor.nonzero, Tensor.numpy, lambda x: x.sum().item()])
def test_a_model_that_cannot_run_on_the_meta_device_is_counted_where_it_is(look):
    model = LooksAtValues(look)
    weight = model.fc.weight
    assert count_cost(model, (1, 1, 8))[:2] == (64, 64)
    assert model.fc.weight is weight
    assert model.training


def test_counting_leaves_no_tensor_in_a_cache_of_the_model():
    model = timm.create_model("levit_128s", num_classes=10)  # its attention keeps biases for each device
    count_cost(model, (3, 224, 224))
    assert not any(getattr(module, "attention_bias_cache", None) for module in model.modules())


def test_the_layers_of_an_lstm_are_counted():
    model = nn.Sequential(nn.Flatten(1, 2), nn.LSTM(8, 16, batch_first=True))
    macs = 4 * 10 * (8 + 16) * 16  # four gates for each of ten steps
    assert count_cost(model, (1, 10, 8)).macs == macs


def test_a_model_with_a_hook_that_keeps_activations():
    """Which cannot be copied once it has seen images."""
    model = timm.create_model("test_resnet")

    class Recorder:
        def __init__(self):
            self.seen = []

        def keep(self, module, inputs, output):
            self.seen.append(output)

    expected = count_cost(model, (3, 32, 32))
    model.layer1.register_forward_hook(Recorder().keep)
    model(torch.randn(2, 3, 64, 64))
    assert count_cost(model, (3, 32, 32))[:2] == expected[:2]


def test_the_memory_of_a_forward_pass_is_that_of_the_maps_that_live_together():
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 16, 1))
    bytes_of_a_channel = 4 * 10 * 10
    assert memory_per_image(layers, torch.zeros(5, 3, 10, 10)) == (2 + 16) * bytes_of_a_channel
    assert memory_per_image(nn.Flatten(), torch.zeros(5, 3, 10, 10)) == 0
