"""The arithmetic behind the tables of benchmarks/."""
import sys

import pytest

from .conftest import ROOT

MODULES = ("frozen_picture", "intervals", "json_lines")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_interval_of_a_mean():
    from intervals import mean_interval

    assert mean_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, pytest.approx(1.9632, abs=1e-4))  # 2.776 * 1.5811 / 5**0.5


def test_a_line_that_was_cut_short_is_passed_over(tmp_path):
    from json_lines import append_line, read_lines

    path = tmp_path / "runs/lines.jsonl"
    assert read_lines(path) == []
    append_line(path, {"seed": 0})
    with path.open("a") as file:
        file.write('\n{"seed": 1, "to')
    append_line(path, {"seed": 2})
    with pytest.warns(UserWarning, match=r"lines.jsonl: skipped a line that was cut short: .\"seed\": 1, \"to"):
        assert read_lines(path) == [{"seed": 0}, {"seed": 2}]


def test_comparisons_are_paired_by_seed_at_equal_cost():
    from frozen_picture import compare, compare_static

    def row(method, seed, *points):
        return {"network": "net", "method": method, "seed": seed, "exit_top1": [90.0],
                "points": [{"share": share, "top1": top1} for share, top1 in points]}

    rows = [row("ours", 0, (0.3, 70.0), (0.7, 90.0)), row("ours", 1, (0.3, 72.0), (0.7, 92.0)),
            row("earlyon", 0, (0.4, 60.0), (0.6, 80.0)), row("earlyon", 1, (0.4, 60.0), (0.6, 84.0)),
            row("small", 0, (0.4, 76.0)), row("small", 1, (0.4, 76.0)), row("tiny", 0, (0.3, 71.0))]
    high, middle, low = compare(rows)
    assert (middle["top1"]["ours"], middle["top1"]["earlyon"]) == (pytest.approx(81), pytest.approx(71))
    assert middle["ours_less"]["earlyon"]["by_seed"] == pytest.approx([10, 10])
    assert high["ours_less"]["earlyon"]["mean"] == pytest.approx(9)
    assert high["ours_less"]["earlyon"]["interval"] == pytest.approx((9 - 12.706, 9 + 12.706), abs=1e-3)
    assert list(low["top1"]) == ["ours"]  # earlyon's never cost so little
    assert low["ours_less"] == {}
    assert (low["static"]["network"], middle["static"]["network"]) == ("tiny", "small")
    small, tiny = compare_static(rows)
    assert small["ours_less"]["by_seed"] == pytest.approx([-1, 1])
    assert tiny["ours_less"]["interval"] == (float("-inf"), float("inf"))
