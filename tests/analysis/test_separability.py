"""Sums of squares of clusters whose spread is known."""

import re
from io import StringIO

import pytest
import timm
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_selfdistill import wrap_self_distill
from timm_selfdistill.analysis import SeparabilityReport, measure_separability, plot_separability
from timm_selfdistill.analysis.separability import ClassSums, ExitSeparability, project

from ..conftest import small_backbone, small_model


def loader(labels: torch.Tensor, size: int = 32) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(len(labels), 3, size, size, generator=generator), labels), 20)


def direct(features: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """SSE and SSB by their definition."""
    features, sse, ssb = features.double(), 0.0, 0.0
    for label in labels.unique():
        own = features[labels == label]
        sse += float((own - own.mean(0)).square().sum())
        ssb += len(own) * float((own.mean(0) - features.mean(0)).square().sum())
    return sse, ssb


def in_batches(features: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[float, float]:
    sums = ClassSums(classes)
    for x, y in zip(features.split(7), labels.split(7)):
        sums.update(x, y)
    return sums.sums_of_squares()


def test_two_clusters_on_a_line():
    """Classes at -2 +- 1 and 2 +- 1: SSE = 4 * 1, SSB = 4 * 2^2."""
    assert in_batches(torch.tensor([[-3.0], [-1], [1], [3]]), torch.tensor([0, 0, 2, 2]), 3) == (4, 16)


def test_two_gaussian_clusters():
    """n in each, means +-d in one of D dimensions, standard deviation s: SSE = (2 n - 2) D s^2, SSB = 2 n d^2 + D s^2
    in expectation."""
    n, dims, d, s = 5_000, 16, 2.0, 0.5
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * n) % 2
    features = s * torch.randn(2 * n, dims, generator=generator)
    features[:, 3] += d * (2 * labels - 1)
    sse, ssb = in_batches(features, labels, 2)
    assert sse == pytest.approx((2 * n - 2) * dims * s**2, rel=0.01)
    assert ssb == pytest.approx(2 * n * d**2 + dims * s**2, rel=0.02)
    assert (sse, ssb) == pytest.approx(direct(features, labels), rel=1e-9)


def test_features_far_from_zero_do_not_cancel():
    labels = torch.arange(300) % 3
    features = 1e6 + 1e-2 * (torch.randn(300, 4, dtype=torch.double) + labels[:, None])
    assert in_batches(features, labels, 5) == pytest.approx(direct(features, labels), rel=1e-6)


def test_features_are_what_the_classifiers_are_given(tmp_path):
    model, data = small_model().eval(), loader(torch.arange(60) % 10)
    report = measure_separability(model, data, classes=[2, 7])
    x, y = data.dataset.tensors
    with torch.no_grad():
        output = model.forward_exits(x)
        pooled = [feature.mean((2, 3)) for feature in output.features]
    for row, features in zip(report.rows, pooled):
        assert (row.sse, row.ssb) == pytest.approx(direct(features, y), rel=1e-4)
        assert row.ratio == pytest.approx(row.sse / row.ssb)
    assert [(row.exit, row.module, row.dims) for row in report.rows] == [
        (0, "layer1", 96),
        (1, "layer2", 96),
        (2, "layer3", 96),
        (3, "layer4", 96),
    ]
    assert sorted(report.sample_labels.tolist()) == [2] * 6 + [7] * 6
    for sample, features in zip(report.samples, pooled):
        assert torch.allclose(sample, features[(y == 2) | (y == 7)], atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert report.to_dict()["exits"][0]["ratio"] == report.rows[0].ratio
    out = StringIO()
    Console(file=out, width=120).print(report)
    assert "features of 60 images of 10 classes" in out.getvalue()
    plot_separability(tmp_path / "separability.png", report)
    assert (tmp_path / "separability.png").read_bytes().startswith(b"\x89PNG")


def test_batches_make_no_difference_and_one_pass_is_enough():
    model, data = small_model().train(), loader(torch.arange(60) % 10)
    calls = []
    model.backbone.layer1.register_forward_hook(lambda *_: calls.append(1))
    report = measure_separability(model, data)
    assert len(calls) == 3
    assert model.training
    other = measure_separability(model, DataLoader(data.dataset, 60))
    assert [row.sse for row in report.rows] == pytest.approx([row.sse for row in other.rows], rel=1e-5)


class ConvolutionalHead(nn.Module):
    def __init__(self, stage, teacher, num_classes):
        super().__init__()
        self.feature = nn.Conv2d(stage.channels, teacher.channels, 1)
        self.classifier = nn.Conv2d(teacher.channels, num_classes, 1)

    def forward(self, x):
        feature = self.feature(x)
        return self.classifier(feature).mean((2, 3)), feature


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
def test_other_networks_and_heads(name):
    model = wrap_self_distill(timm.create_model(name, num_classes=10), head=ConvolutionalHead)
    report = measure_separability(model, loader(torch.arange(20) % 10, 160))
    assert all(row.sse > 0 and row.ssb > 0 for row in report.rows)
    assert report.rows[-1].dims == model.backbone.get_classifier().in_features


def test_the_picture_has_room_for_a_hundred_images_of_a_class():
    report = measure_separability(small_model(), loader(torch.tensor([0] * 130 + [1] * 30)))
    assert report.sample_labels.bincount().tolist() == [100, 30]


def test_the_principal_axes_are_those_of_the_largest_spread():
    features = torch.zeros(200, 5)
    features[:, 4], features[:, 1] = 3 * torch.randn(200), torch.randn(200)
    points, shares = project(features + 100)
    first = points[:, 0] * torch.sign(points[0, 0] * (features[0, 4] - features[:, 4].mean()))
    assert torch.corrcoef(torch.stack([first, features[:, 4].double()]))[0, 1] > 0.99
    assert shares.sum() == pytest.approx(1)
    assert project(torch.ones(1, 3))[0].tolist() == [[0, 0]]


def test_axes_of_successive_exits_point_alike(monkeypatch):
    """Exits whose features are those of the first, turned and mirrored: the same picture."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    first = torch.randn(40, 6) * torch.tensor([5.0, 2, 1, 1, 1, 1])
    turns = [torch.linalg.qr(torch.randn(6, 6))[0] for _ in range(8)]
    samples = [first, -first, *(first @ turn for turn in turns), *(-first @ turn for turn in turns)]
    signs = {tuple((project(sample)[0] * project(first)[0]).sum(0).sign().tolist()) for sample in samples}
    assert len(signs) > 1  # by themselves they do not
    rows = [ExitSeparability(exit, "layer", 6, 1.0, 1.0) for exit in range(len(samples))]
    plot_separability("", SeparabilityReport(rows, 40, 1, samples, torch.zeros(40, dtype=torch.long)))
    points = [torch.tensor(axes.collections[0].get_offsets()) for axes in figures[0].axes]
    assert len(points) == 18
    for drawn in points:
        torch.testing.assert_close(drawn, points[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (loader(torch.ones(4, dtype=torch.long)), "all 4 images .*class 1; separability .*two"),
        (loader(torch.arange(4)), "4 classes .*one image; separability .*two images"),
        (loader(torch.full((4,), -1)), "labels .*0 to 9, got -1 to -1; -1 .*without a label"),
        ([], "loader .*no images"),
    ],
)
def test_wrong_data(data, message):
    with pytest.raises(ValueError, match=message):
        measure_separability(small_model(), data)


def test_wrong_models_and_classes():
    with pytest.raises(ValueError, match="separability .*SelfDistillModel, got ResNet, .*wrap_self_distill"):
        measure_separability(small_backbone(), loader(torch.arange(10)))
    for classes in ([], [10], [-1], [0.5]):
        with pytest.raises(ValueError, match=f"classes .*0 to 9, got {re.escape(str(classes))}"):
            measure_separability(small_model(), loader(torch.arange(10)), classes=classes)
    with pytest.raises(ValueError, match=r"classes .*images, \[7, 8\] .*choose others"):
        measure_separability(small_model(), loader(torch.arange(20) % 7), classes=[7, 3, 8])


def test_dead_features_have_no_ratio(tmp_path):
    model = small_model()
    for parameter in model.heads[0].proj.parameters():  # what the classifier is given is 0
        nn.init.zeros_(parameter)
    report = measure_separability(model, loader(torch.arange(20) % 10))
    assert (report.rows[0].sse, report.rows[0].ssb, report.rows[0].ratio) == (0, 0, None)
    plot_separability(tmp_path / "separability.png", report)
