"""What stands in exits.png and curves.png."""

from itertools import pairwise

import pytest
from PIL import Image

from timm_selfdistill import hub, pictures
from timm_selfdistill.training.outputs import run_directory

ROWS = [
    {"exit": 0, "module": "layer1", "top1": 82.0, "macs": 12e6, "share": 0.32},
    {"exit": 1, "module": "layer4", "top1": 85.0, "macs": 37e6, "share": 1.0},
    {"exit": "ensemble", "module": "layer4", "top1": 85.5, "macs": 38e6, "share": 1.03},
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, as matplotlib's objects."""
    made = []

    def create(*size):
        made.append(pictures.create_figure(*size))
        return made[-1]

    for module in (hub.picture, run_directory):
        monkeypatch.setattr(module, "create_figure", create)
    return made


def test_the_interval_is_wilsons():
    """The 95 % interval of 50 of 100, and of all of 10 (Wilson, 1927)."""
    assert pictures.accuracy_interval(50.0, 100) == pytest.approx((40.38, 59.62), abs=0.01)
    assert pictures.accuracy_interval(100.0, 10) == pytest.approx((72.25, 100.0), abs=0.01)


def test_the_interval_holds_the_accuracy_itself():
    """Also where all or none are right, which rounding would put outside."""
    for images in range(1, 500):
        for right in {0, 1, images // 2, images}:
            low, high = pictures.accuracy_interval(100 * right / images, images)
            assert low <= 100 * right / images <= high


@pytest.mark.parametrize("images", [1000, None])
def test_exits_have_the_interval_of_the_number_of_images(images, figures, tmp_path):
    hub.plot_exits(tmp_path / "exits.png", "resnet18", ROWS, images=images)
    (axes,) = figures[0].axes
    bars = [bar.lines[2][0].get_segments()[0][:, 1] for bar in axes.containers if bar.has_yerr]
    if images is None:
        assert bars == []
        return
    assert len(bars) == len(ROWS)
    for bar, row in zip(bars, ROWS):
        assert tuple(bar) == pytest.approx(pictures.accuracy_interval(row["top1"], images))
    assert "95 % intervals from 1,000 images" in axes.get_title()


def test_the_plain_network_is_the_line_to_compare_with(figures, tmp_path):
    baseline = {"exit": 0, "top1": 84.0, "macs": 37e6, "share": 1.0}
    hub.plot_exits(tmp_path / "exits.png", "resnet18", ROWS, baseline=baseline, images=1000)
    (axes,) = figures[0].axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "deepest exit, the plain network at inference: 85.00 %" in texts
    assert "plain network, trained alone: 84.00 %" in texts
    assert any(list(line.get_ydata()) == [85.0, 85.0] for line in axes.lines)


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2]])
def test_all_of_the_legend_is_in_the_picture(rows, figures, tmp_path):
    curve = [{"threshold": 0.5, "top1": 83.0, "macs": 15e6}, {"threshold": 0.9, "top1": 85.0, "macs": 30e6}]
    hub.plot_exits(tmp_path / "exits.png", "resnet18", rows, curve, rows[-1], rows[-1], images=300)
    (axes,) = figures[0].axes
    inside, legend = figures[0].bbox, axes.get_legend().get_window_extent()
    assert inside.x0 <= legend.x0 < legend.x1 <= inside.x1
    assert inside.y0 <= legend.y0 < legend.y1 <= axes.xaxis.label.get_window_extent().y0
    assert Image.open(tmp_path / "exits.png").width >= 600


@pytest.mark.parametrize("spread", [0.0, 0.01, 5.0])
def test_names_at_the_curves_do_not_overlap(spread, figures, tmp_path):
    keys = [*(f"top1_exit_{index}" for index in range(4)), "top1_ensemble"]
    history = [
        {"epoch": epoch, "train_loss": 1.0, **{key: 80 + epoch + spread * place for place, key in enumerate(keys)}}
        for epoch in (1, 2, 3)
    ]
    run_directory.plot_curves(tmp_path / "curves.png", history)
    accuracy, _ = figures[0].axes
    boxes = sorted((text.get_window_extent() for text in accuracy.texts), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))
    assert all(box.x1 <= figures[0].bbox.x1 for box in boxes)


def test_the_best_epoch_of_the_deepest_exit_is_named(figures, tmp_path):
    history = [
        {"epoch": epoch, "train_loss": 1.0, "top1_exit_0": 10.0 * epoch, "top1_exit_1": top1, "top1_ensemble": 99.0}
        for epoch, top1 in ((1, 50.0), (2, 71.25), (3, 70.0))
    ]
    run_directory.plot_curves(tmp_path / "curves.png", history)
    assert "exit 1, best 71.25" in [text.get_text() for text in figures[0].axes[0].texts]


def test_curves_of_a_run_that_measured_nothing_yet(tmp_path):
    run_directory.plot_curves(tmp_path / "curves.png", [{"epoch": 1, "train_loss": 2.0}])
    assert Image.open(tmp_path / "curves.png").width >= 600
