"""The arithmetic behind the tables of benchmarks/."""

import pytest


def test_the_interval_of_a_mean(benchmarks):
    found = benchmarks("intervals").mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == (3.0, pytest.approx(2.776 * 1.5811 / 5**0.5, abs=1e-3))


def test_a_line_that_was_cut_short_is_passed_over(benchmarks, tmp_path):
    lines = benchmarks("json_lines")
    append_line, read_lines = lines.append_line, lines.read_lines
    path = tmp_path / "runs/lines.jsonl"
    assert read_lines(path) == []
    append_line(path, {"seed": 0})
    with path.open("a") as file:
        file.write('\n{"seed": 1, "to')
    append_line(path, {"seed": 2})
    with pytest.warns(UserWarning, match=r'lines\.jsonl.*"seed": 1, "to$'):
        assert read_lines(path) == [{"seed": 0}, {"seed": 2}]


def test_comparisons_are_paired_by_seed_at_equal_cost(benchmarks):
    picture = benchmarks("frozen_picture")

    def row(method, seed, *points):
        return {
            "network": "net",
            "method": method,
            "seed": seed,
            "exit_top1": [90.0],
            "points": [{"share": share, "top1": top1} for share, top1 in points],
        }

    rows = [
        row("ours", 0, (0.3, 70.0), (0.7, 90.0)),
        row("ours", 1, (0.3, 72.0), (0.7, 92.0)),
        row("earlyon", 0, (0.4, 60.0), (0.6, 80.0)),
        row("earlyon", 1, (0.4, 60.0), (0.6, 84.0)),
        row("small", 0, (0.4, 76.0)),
        row("small", 1, (0.4, 76.0)),
        row("tiny", 0, (0.3, 71.0)),
    ]
    high, middle, low = picture.compare(rows)
    assert (middle["top1"]["ours"], middle["top1"]["earlyon"]) == (pytest.approx(81), pytest.approx(71))
    assert middle["ours_less"]["earlyon"]["by_seed"] == pytest.approx([10, 10])
    assert high["ours_less"]["earlyon"]["mean"] == pytest.approx(9)
    assert high["ours_less"]["earlyon"]["interval"] == pytest.approx((9 - 12.706, 9 + 12.706), abs=1e-3)
    assert list(low["top1"]) == ["ours"]  # earlyon's never cost so little
    assert low["ours_less"] == {}
    assert (low["static"]["network"], middle["static"]["network"]) == ("tiny", "small")
    small, tiny = picture.compare_static(rows)
    assert small["ours_less"]["by_seed"] == pytest.approx([-1, 1])
    assert tiny["ours_less"]["interval"] == (float("-inf"), float("inf"))
