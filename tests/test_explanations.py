"""The runs and the table of benchmarks/explanations.py."""

import json
import sys

import pytest
import torch

from .conftest import ROOT

HARDWARE = {"device": "AMD EPYC", "threads": 1}


@pytest.fixture
def explanations(benchmarks):
    return benchmarks("explanations")


def row(method, seed, top1, gradients, ratios=()):
    return {
        "setting": "characters-10",
        "method": method,
        "seed": seed,
        "top1": top1,
        "gradients": gradients,
        "sse_over_ssb": list(ratios),
        "hardware": HARDWARE,
    }


def test_the_table_from_its_lines(explanations):
    rows = [
        row("plain", 1, [80.0, 70.0, 60.0, 40.0], [[1.0, 2.0], [4.0, 2.0]]),
        row("plain", 2, [82.0, 72.0, 62.0, 43.0], [[1.0, 2.0], [4.0, 2.0]]),
        row("paper", 1, [81.0, 76.0, 70.0, 45.0], [[2.0, 1.0], [8.0, 4.0]], [0.9, 0.5]),
        row("paper", 2, [83.0, 78.0, 72.0, 49.0], [[2.0, 1.0], [8.0, 4.0]], [0.9, 0.5]),
    ]
    assert explanations.format_table(rows).splitlines() == [
        "| method | fall at noise 0.1 | fall at noise 0.2 | fall at noise 0.3 | less than plain's, at the last |"
        " gradient over plain's, by section | SSE / SSB, by exit |",
        "|---|---|---|---|---|---|---|",
        "| plain | 10.00 ± 0.00 | 20.00 ± 0.00 | 39.50 ± 6.35 |  |  |  |",
        "| paper | 5.00 ± 0.00 | 11.00 ± 0.00 | 35.00 ± 12.71 | +4.50 ± 6.35 | 2.00 ± 0.00, 1.00 ± 0.00 |"
        " 0.90 ± 0.00, 0.50 ± 0.00 |",
        "",
        "characters-10; 2 seeds. device AMD EPYC, threads 1.",
    ]


def test_batches_for_gradients_are_mixed(explanations, benchmarks):
    labels = torch.arange(62).repeat_interleave(10)
    images = benchmarks("evidence_data").Images(torch.zeros(620, 1, 32, 32), labels, moved=True)
    chosen = explanations.some(images, 640)
    assert sorted(chosen.indices) == list(range(620))
    assert len({labels[index].item() for index in chosen.indices[:64]}) > 30
    assert len(explanations.some(images, 64)) == 64


@pytest.mark.benchmark
def test_tested_points_are_trained_again_and_measured(explanations, benchmarks, monkeypatch, tmp_path, learning_rates):
    grid = benchmarks("evidence_grid")
    monkeypatch.setitem(grid.SETTINGS, "tiny", grid.Setting("typefaces", 2, "resnet10-16", 10))
    learning_rates(0.1)
    monkeypatch.setitem(benchmarks("evidence_data").DATA, "typefaces", 100)
    monkeypatch.setattr(benchmarks("evidence_data"), "TYPEFACES", ROOT / "tests/data")
    lines, output, page = tmp_path / "evidence.jsonl", tmp_path / "explanations.jsonl", tmp_path / "page.md"
    described = {"setting": "tiny", **grid.SETTINGS["tiny"]._asdict(), "lr": 0.1, "weight_decay": 5e-4}
    rows = [
        described | {"phase": phase, "method": method, "weight": weight, "seed": seed, "top1": [weight or 0.0]}
        for method, weights in (("plain", [None]), ("paper", [0.7, 0.5, 0.3]))
        for phase, seed, weight in [("test", 1, weights[0]), *(("tune", 0, weight) for weight in weights)]
    ]
    lines.write_text(
        "\n".join(
            map(
                json.dumps,
                [
                    *rows,
                    described
                    | {  # of a point that tuning did not choose
                        "phase": "test",
                        "method": "plain",
                        "weight": None,
                        "seed": 2,
                        "lr": 0.4,
                        "top1": [0.0],
                    },
                ],
            )
        )
    )
    page.write_text("<!-- table explanations -->\n<!-- end -->\n")
    command = [
        "explanations.py",
        "--setting",
        "tiny",
        "--methods",
        "plain",
        "paper",
        "--lines",
        str(lines),
        "--output",
        str(output),
        "--page",
        str(page),
    ]
    for _ in range(2):  # the second time nothing is left to do
        monkeypatch.setattr(sys, "argv", command)
        explanations.main()
        plain, paper = (json.loads(line) for line in output.read_text().splitlines() if line)
    assert (len(plain["top1"]), len(plain["gradients"]), len(plain["gradients"][0])) == (4, 2, 4)
    assert (plain["sse_over_ssb"], len(paper["sse_over_ssb"])) == ([], 4)
    assert paper["weight"] == 0.7
    assert plain["gradients"][0] != plain["gradients"][1]
    assert "| paper | " in page.read_text()

    monkeypatch.setattr(sys, "argv", [*command, "--setting", "families-30"])
    with pytest.raises(ValueError, match=r"benchmarks/evidence\.py --settings families-30 --methods plain"):
        explanations.main()
