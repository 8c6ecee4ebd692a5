"""Exits as graphs of torch.fx, and in eight bits by both of PyTorch's ways, beside the same exits in float."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchvision.models.feature_extraction import create_feature_extractor

from timm_selfdistill import SelfDistillLoss, TruncatedModel, wrap_self_distill
from timm_selfdistill.inference.export import export_program

from ..conftest import small_backbone, small_model

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's quantization warns of itself
EXITS = [0, -1, "ensemble"]
POINTS = 2.0
"""Most points of accuracy that eight bits may cost."""


@pytest.fixture(scope="module")
def data(fashion_tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """400 images with their labels."""
    images, labels = zip(*fashion_tensors[0])
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    model = small_model(in_chans=1).train()
    criterion, optimizer = SelfDistillLoss(), torch.optim.AdamW(model.parameters(), 3e-3)
    for rows in torch.cat([torch.randperm(400) for _ in range(8)]).split(50):
        optimizer.zero_grad()
        criterion(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
    return model.eval()


def quantize_fx(network: TruncatedModel, images: torch.Tensor) -> nn.Module:
    prepared = prepare_fx(copy.deepcopy(network), get_default_qconfig_mapping("x86"), (images[:8],))
    prepared(images)
    return convert_fx(prepared)


def quantize_pt2e(network: TruncatedModel, images: torch.Tensor) -> nn.Module:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", exc_type=ImportError)
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(export_program(network, images.shape[1:]).module(), quantizer)
    prepared(images)
    return pt2e.convert_pt2e(prepared)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean() * 100)


@pytest.mark.parametrize("quantize", [pytest.param(quantize_fx, marks=pytest.mark.slow), quantize_pt2e])
@pytest.mark.parametrize("exit", EXITS)
def test_eight_bits_are_as_accurate_as_float(exit, quantize, model, data):
    images, labels = data
    network = model.truncate(exit)
    with torch.no_grad():
        expected, found = network(images), quantize(network, images)(images)
    assert not torch.equal(found, expected)
    assert accuracy(expected, labels) > 20
    assert abs(accuracy(found, labels) - accuracy(expected, labels)) <= POINTS
    assert accuracy(found, expected.argmax(1)) >= 90


@pytest.mark.parametrize("head", ["bottleneck", "attention", "linear"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_mambaout"])
def test_torch_fx_traces_every_exit(name, head):
    model = small_model(name, head=head).eval()
    for exit in EXITS:
        network = model.truncate(exit)
        traced = torch.fx.symbolic_trace(network)
        for size in (64, 79):  # odd maps, too
            x = torch.randn(2, 3, size, size)
            assert torch.equal(traced(x), network(x))
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), network(x))


def test_torchvision_takes_features_out_of_an_exit():
    network, x = small_model().eval().truncate(1), torch.randn(2, 3, 64, 64)
    nodes = {"model.backbone.layer1": "first", "model.heads.1.fc": "logits"}
    found = create_feature_extractor(network, nodes)(x)
    assert torch.equal(found["first"], network.backbone.forward_intermediates(x, [1], intermediates_only=True)[0])
    assert torch.equal(found["logits"], network(x))


def test_a_head_of_the_wrong_shape_is_still_refused():
    model = wrap_self_distill(small_backbone(), head=lambda stage, *_: nn.Conv2d(stage.channels, 10, 1)).eval()
    with pytest.raises(ValueError, match=r"head of ResNet .*must return logits \(2, 10\)"):
        model.truncate(0)(torch.randn(2, 3, 64, 64))
