"""The page's second tab: what is recorded of a model, drawn."""

import json
import shutil

import pytest

from timm_selfdistill.cli.demo import open_views
from timm_selfdistill.demo import Recorded, read_recorded
from timm_selfdistill.demo.chart import HEIGHT, WIDTH, draw_chart

from ..conftest import small_model

ROWS = [
    {"exit": 0, "module": "layer1", "top1": 80.0, "macs": 10e6, "share": 0.25},
    {"exit": 1, "module": "layer4", "top1": 90.0, "macs": 40e6, "share": 1.0},
    {"exit": "ensemble", "module": "layer4", "top1": 91.0, "macs": 41e6, "share": 1.025},
]


def test_the_second_tab_shows_what_tradeoff_measured(views):
    html = views.model()
    assert html.count("<circle") == html.count("sd-interval") == 5
    assert "100 images; the lines are 95 % intervals" in html
    assert "early exit, one threshold" in html
    assert "early exit, calibrated" in html
    assert "top-1 61.00 % at 50% of the multiply-adds" in html
    assert html.count("data:image/png;base64,") == 1
    assert "<td>60.00</td>" in html


def test_a_model_alone_shows_its_own_record(folder, tmp_path):
    shutil.copytree(folder / "run/best", tmp_path / "model")
    recorded = open_views(str(tmp_path / "model")).recorded
    assert (recorded.images, recorded.source) == (400, "shoes, split test")
    assert recorded.curve == []
    assert recorded.gallery is recorded.calibrated is None
    assert open_views(str(tmp_path / "model"), tradeoff=folder / "run").recorded.images == 100


def test_a_model_without_accuracies_says_how_to_measure_them(views):
    recorded = read_recorded(small_model().eval(), views.recorded.gallery.parent / "none", None)
    assert draw_chart(recorded) is None
    assert [row["exit"] for row in recorded.rows] == [0, 1, 2, 3, "ensemble"]


def test_a_wrong_folder_and_a_damaged_file_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tradeoff.json; expected a folder that timm-selfdistill"):
        open_views(str(folder / "run"), tradeoff=tmp_path)
    for text, message in (("{", "tradeoff.json is no valid JSON"), ("[]", "must hold an object, got list")):
        (tmp_path / "tradeoff.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_views(str(folder / "run"), tradeoff=tmp_path)
    (tmp_path / "tradeoff.json").write_text(json.dumps({"exits": 5, "early_exit": [3], "images": "many"}))
    assert open_views(str(folder / "run"), tradeoff=tmp_path).recorded.images is None


def test_the_drawing_keeps_order_and_stays_within_its_borders():
    curve = [{"threshold": 0.5, "top1": 85.0, "macs": 20e6}]
    chart = draw_chart(Recorded(ROWS, images=1000, curve=curve, calibrated={**curve[0], "top1": 88.0}))
    assert [point.label for point in chart.points] == ["0", "1", "E"]
    assert [point.x for point in chart.points] == sorted(point.x for point in chart.points)
    assert chart.points[0].y > chart.calibrated[1] > chart.points[1].y > chart.points[2].y
    for point in chart.points:
        assert 0 < point.x < WIDTH
        assert 0 < point.high < point.y < point.low < HEIGHT
    per_point = (chart.points[0].y - chart.points[1].y) / 10
    half = (chart.points[0].low - chart.points[0].high) / 2 / per_point
    assert half == pytest.approx(1.96 * 100 * (0.8 * 0.2 / 1000) ** 0.5, abs=0.05)  # points of top-1
    assert 3 <= len(chart.x_ticks) <= 6
    assert 3 <= len(chart.y_ticks) <= 7
    assert all(float(label) <= 100 for _, label in chart.y_ticks)


def test_without_the_number_of_images_there_are_no_intervals():
    chart = draw_chart(Recorded([{**ROWS[0], "top1": 100.0}]))
    assert chart.points[0].low is chart.points[0].high is None
    assert 0 < chart.points[0].y < HEIGHT
