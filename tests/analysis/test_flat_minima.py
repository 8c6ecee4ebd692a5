"""Noise on the weights: what it does to a loss whose curvature is known, and that nothing of it stays."""

from io import StringIO
from math import sqrt
from statistics import mean, stdev

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_selfdistill.analysis import FlatMinimaReport, measure_flatness, plot_flatness, sweep_noise
from timm_selfdistill.analysis.flat_minima import draw_noise, shaken
from timm_selfdistill.training.outputs.metrics import ExitMetrics

from ..conftest import small_backbone, small_model


def loader(count: int = 40, size: int = 32) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 10), 20
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("scaled", [True, False])
def test_a_quadratic_loss_rises_by_half_the_variance_times_the_trace(scaled):
    """At the minimum of w^T H w / 2: by sigma^2 trace(H) / 2, within three standard errors of the draws."""
    model = nn.Linear(20, 1, bias=False, dtype=torch.double)
    curvature = torch.linspace(0.1, 5, 20, dtype=torch.double)  # H is diagonal; its trace is 51
    minimum = model.weight.detach().clone()
    rms = float(minimum.square().mean().sqrt())

    def loss(_: float) -> float:
        return float(0.5 * (curvature * (model.weight.detach() - minimum).square()).sum())

    found = sweep_noise(model, loss, levels=[0.1, 0.5], draws=400, scaled=scaled)
    for level, losses in found.items():
        sigma = level * rms if scaled else level
        expected = 0.5 * sigma**2 * 51
        assert abs(mean(losses) - expected) < 3 * stdev(losses) / sqrt(400)
        assert stdev(losses) / sqrt(400) < 0.05 * expected
    assert torch.equal(model.weight, minimum)


def test_the_cross_entropy_of_a_linear_classifier_rises_by_its_hessian():
    """trace(H) = mean over images of |x|^2 sum_k p_k (1 - p_k); the slope cancels between noise and its opposite."""
    model, x, y = nn.Linear(8, 3, bias=False).double(), torch.randn(50, 8).double(), torch.arange(50) % 3
    p = model(x).detach().softmax(1)
    trace = float((x.square().sum(1) * (p * (1 - p)).sum(1)).mean())
    untouched, sigma, rises = float(F.cross_entropy(model(x).detach(), y)), 0.01, []
    for draw in range(300):
        noise = draw_noise(model, draw, scaled=False)
        losses = []
        for level in (sigma, -sigma):
            with shaken(noise, level), torch.no_grad():
                losses.append(float(F.cross_entropy(model(x), y)))
        rises.append(mean(losses) - untouched)
    assert abs(mean(rises) - 0.5 * sigma**2 * trace) < 3 * stdev(rises) / sqrt(300)


def test_noise_is_of_the_size_that_is_asked_for():
    model = small_model()
    with torch.no_grad():
        model.backbone.conv1[0].weight.mul_(7)
        model.backbone.fc.bias.zero_()
        model.backbone.layer4[0].bn1.weight.fill_(1)  # of root mean square 1, and standard deviation 0
    before, conv = weights(model), model.backbone.layer3[0].conv1.weight
    for scaled in (True, False):
        with shaken(draw_noise(model, 0, scaled), 0.1):
            moved = conv.detach() - before["backbone.layer3.0.conv1.weight"]
            size = float(before["backbone.layer3.0.conv1.weight"].square().mean().sqrt()) if scaled else 1
            assert float(moved.std()) == pytest.approx(0.1 * size, rel=0.05)
            assert float((model.backbone.layer4[0].bn1.weight - 1).detach().square().mean().sqrt()) == pytest.approx(
                0.1, rel=0.2
            )
            assert model.backbone.fc.bias.any() != scaled
            buffers = dict(model.named_buffers())
            assert all(torch.equal(buffer, before[name]) for name, buffer in buffers.items())
        assert_equal(model, before)


def test_a_plain_network_gets_the_noise_of_the_self_distilled_ones_backbone():
    backbone, model = small_backbone(), small_model()
    model.backbone.load_state_dict(backbone.state_dict())
    own, others = draw_noise(backbone, 3), draw_noise(model, 3)
    names = dict(backbone.named_parameters())
    assert all(torch.equal(own[names[name]], others[p]) for name, p in model.backbone.named_parameters())
    assert not torch.equal(draw_noise(backbone, 4)[backbone.conv1[0].weight], own[backbone.conv1[0].weight])
    assert not torch.equal(draw_noise(backbone, 3, seed=1)[backbone.conv1[0].weight], own[backbone.conv1[0].weight])
    plain, distilled = (measure_flatness(net, loader(), levels=[0.2], draws=2) for net in (backbone, model))
    assert [row["loss"] for row in plain.of_exit()] == pytest.approx([row["loss"] for row in distilled.of_exit()])


def test_weights_are_the_same_tensors_afterwards_even_if_it_fails():
    model = small_model().train()
    model.heads[0].eval()
    before, storage = weights(model), model.backbone.conv1[0].weight.data_ptr()
    grads = [p.requires_grad for p in model.parameters()]
    measure_flatness(model, loader(), levels=[0.5], draws=1)
    assert_equal(model, before)
    assert model.backbone.conv1[0].weight.data_ptr() == storage
    assert model.training
    assert not model.heads[0].training

    def fail(_: float) -> None:
        assert not torch.equal(model.backbone.conv1[0].weight, before["backbone.conv1.0.weight"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_noise(model, fail, levels=[0.5])
    assert_equal(model, before)
    assert model.backbone.conv1[0].weight.data_ptr() == storage
    assert grads == [p.requires_grad for p in model.parameters()]


def test_channels_last_half_precision_and_shared_weights_stay_so():
    model = small_backbone().to(torch.bfloat16, memory_format=torch.channels_last)
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
    with shaken(draw_noise(model, 0), 0.1):
        weight = model.layer2[0].conv1.weight
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert model.layer1[0].conv2.weight is model.layer1[0].conv1.weight


def test_a_report_has_every_level_and_exit(tmp_path):
    model = small_model().eval()
    report = measure_flatness(model, loader(), levels=[0.2, 0.1], draws=3)
    assert report.levels == [0, 0.1, 0.2]
    assert [len(draws) for draws in report.metrics] == [1, 3, 3]
    x, y = loader().dataset.tensors
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    assert [row["loss"] for row in report.rows()[:4]] == pytest.approx(
        [float(F.cross_entropy(part, y)) for part in logits], rel=1e-5
    )
    row = report.of_exit(1)[2]
    losses = [exits[1].loss for exits in report.metrics[2]]
    assert (row["loss"], row["loss_std"]) == pytest.approx((mean(losses), stdev(losses)))
    assert (row["loss_min"], row["loss_max"]) == (min(losses), max(losses))
    assert report.of_exit(1)[0]["loss_std"] is None
    assert report.to_dict()["rows"] == report.rows()
    out = StringIO()
    Console(file=out, width=160).print(report)
    assert "noise scaled by each tensor; draws: 3, images: 40" in out.getvalue()
    assert out.getvalue().count("±") == 2 * 5 * 2  # two levels, five answers, accuracy and loss
    plot_flatness(
        tmp_path / "flat.png",
        {"plain": measure_flatness(model.backbone, loader(), levels=[0.1], draws=1), "self-distilled": report},
    )
    assert (tmp_path / "flat.png").read_bytes().startswith(b"\x89PNG")


def test_the_band_goes_from_the_smallest_to_the_largest_draw(monkeypatch):
    """Also where the standard deviation is larger than the mean, which no logarithmic axis could show."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    metrics = [
        [[ExitMetrics(0, 90.0, 100.0, 0.5)]],
        [[ExitMetrics(0, top1, 100.0, loss)] for top1, loss in ((80.0, 1.0), (20.0, 30.0), (80.0, 1.0))],
    ]
    plot_flatness("", {"a": FlatMinimaReport([0, 0.1], True, 3, 0, 10, metrics)})
    (figure,) = figures
    for axes, band in zip(figure.axes, ([90, 20, 80], [0.5, 1, 30])):
        assert set(axes.collections[0].get_paths()[0].vertices[:, 1]) == set(band)
    assert figure.axes[1].get_ylim()[0] > 0.3


def test_noise_that_makes_no_numbers_is_refused_and_taken_back():
    model = small_backbone()
    before = weights(model)
    with pytest.raises(ValueError, match=r"level 1e\+38 .*no finite numbers; .*lower levels"):
        measure_flatness(model, loader(), levels=[1e38], draws=1, scaled=False)
    assert_equal(model, before)
    nn.init.constant_(model.fc.bias, float("nan"))
    with pytest.raises(ValueError, match="logits .*no finite numbers; .*damaged"):
        measure_flatness(model, loader(), draws=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": []}, r"levels .*above 0, got \[\]"),
        ({"levels": [0.1, 0]}, r"levels .*above 0, got \[0.1, 0\]"),
        ({"levels": [0.1, 0.1]}, r"levels .*different .*got \[0.1, 0.1\]"),
        ({"levels": [float("nan")]}, r"levels .*above 0, got \[nan\]"),
        ({"draws": 0}, "draws .* 1, got 0"),
        ({"draws": 1.5}, "draws .*whole number.* 1, got 1.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    model = small_backbone()
    model.conv1.register_forward_hook(lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        measure_flatness(model, loader(), **arguments)


def test_a_loader_that_ends_for_good_is_refused():
    with pytest.raises(ValueError, match="loader .*once; .*DataLoader"):
        measure_flatness(small_backbone(), iter(loader()))
