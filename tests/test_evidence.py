"""The runs, tables and picture of benchmarks/evidence.py."""
import json
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from timm_selfdistill.output import SelfDistillOutput

from .conftest import ROOT, run_python

HARDWARE = {"device": "AMD EPYC", "threads": 1, "torch": "2.14.1"}


@pytest.fixture
def tables(benchmarks):
    return benchmarks("evidence_tables")


@pytest.fixture
def tiny(benchmarks, monkeypatch, tmp_path):
    """`evidence.main` on two images of each class of the sample, for five passes."""
    evidence, grid, data = map(benchmarks, ("evidence", "evidence_grid", "evidence_data"))
    monkeypatch.setitem(data.DATA, "typefaces", 100)
    monkeypatch.setattr(data, "TYPEFACES", ROOT / "tests/data")
    monkeypatch.setitem(grid.SETTINGS, "tiny", grid.Setting("typefaces", 2, "resnet10-16", 5))
    monkeypatch.setattr(evidence, "LRS", (0.05, 0.1))
    monkeypatch.setattr(evidence, "WEIGHT_DECAYS", (5e-4,))

    def run(*flags):
        output = tmp_path / "lines.jsonl"
        monkeypatch.setattr(sys, "argv", ["evidence.py", "--settings", "tiny", "--output", str(output), *flags])
        evidence.main()
        return [json.loads(line) for line in output.read_text().splitlines() if line.endswith("}")], output

    return run


def row(method, seed, top1, ensemble=None, **more):
    return {"phase": "test", "setting": "families-30", "method": method, "seed": seed, "lr": 0.1, "weight_decay": 5e-4,
            "weight": None, "top1": top1, "ensemble": ensemble, "images": 3000, "seconds": 60.0 + seed,
            "memory_mb": 19.4, "hardware": HARDWARE, "data_sha256": "0", **more}


def three_seeds():
    return [*(row("plain", seed, [40.0 + seed]) for seed in (1, 2, 3)),
            *(row("dsn", seed, [30.0, 42.0 + 1.5 * seed], 44.0 + seed, seconds=80.0) for seed in (1, 2, 3)),
            *(row("kd", seed, [44.0 + 2 * seed], weight=1.0, teacher_seconds=200.0) for seed in (1, 2, 3))]


def test_a_table_from_its_lines(tables):
    assert tables.format_table(three_seeds(), "families-30").splitlines() == [
        "| method | lr, weight decay, own weight | exits, shallow to deep | ensemble | deepest - plain | deepest - dsn"
        " | seconds | with teacher | MB |",
        "|---|---|---|---|---|---|---|---|---|",
        "| plain | 0.1, 0.0005 | 42.00 ± 2.48 |  |  | -3.00 ± 1.24 (p 0.0091) | 62 | 62 | 19 |",
        "| dsn | 0.1, 0.0005 | 30.00 ± 0.00, 45.00 ± 3.73 | 46.00 ± 2.48 | +3.00 ± 1.24 (p 0.0091) |  | 80 | 80 | 19 |",
        "| kd | 0.1, 0.0005, 1 | 48.00 ± 4.97 |  | +6.00 ± 2.48 (p 0.0091) | +3.00 ± 1.24 (p 0.0091) | 62 | 262 | 19 |",
        "",
        "3,000 training images of families, 60 passes, resnet10-16; 3 seeds. device AMD EPYC, threads 1, torch 2.14.1.",
    ]


def test_one_seed_has_no_interval(tables):
    table = tables.format_table([row("plain", 1, [41.0]), row("dsn", 1, [30.0, 43.0], 44.0)], "families-30")
    assert "| dsn | 0.1, 0.0005 | 30.00, 43.00 | 44.00 | +2.00 |  |" in table
    assert "1 seed. No interval where there is one seed: nothing tells how much another would change." in table


def test_lines_of_different_machines_are_marked(tables):
    rows = [row("plain", 1, [41.0]), row("plain", 2, [42.0], hardware=HARDWARE | {"torch": "2.15.0"})]
    table = tables.format_table(rows, "families-30")
    assert "**Mixed: these lines come from 2 kinds of hardware or versions**" in table


def test_lines_of_different_images_are_marked(tables):
    rows = [row("plain", 1, [41.0]), row("plain", 2, [42.0], data_sha256="1")]
    assert "**Mixed: these lines come from different images.**" in tables.format_table(rows, "families-30")


def test_page_and_picture(tables, tmp_path, monkeypatch):
    lines, page, picture = tmp_path / "evidence.jsonl", tmp_path / "page.md", tmp_path / "gain.png"
    lines.write_text("\n".join(map(json.dumps, three_seeds())) + '\n{"phase": "test", "set')
    page.write_text("Before\n<!-- table families-30 -->\nold\n<!-- end -->\nAfter\n")
    monkeypatch.setattr(sys, "argv", ["x", str(lines), "--page", str(page), "--picture", str(picture)])
    with pytest.warns(UserWarning, match="skipped a line that was cut short"):
        tables.main()
    text = page.read_text()
    assert text.startswith("Before\n<!-- table families-30 -->\n| method |")
    assert text.endswith(" torch 2.14.1.\n<!-- end -->\nAfter\n")
    assert "old" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert tables.gains(three_seeds(), "families", "dsn") == [(30.0, 3.0, pytest.approx(1.24, abs=0.01))]


def test_no_lines(tmp_path):
    done = run_python("benchmarks/evidence_tables.py", tmp_path / "none.jsonl", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "none.jsonl; make them with python benchmarks/evidence.py" in done.stderr


def test_a_run_that_was_cut_short_is_done_again(tiny):
    rows, output = tiny("--methods", "plain", "ensemble", "--seeds", "1")
    assert [(row["phase"], row["method"], row["seed"], row["lr"], row["weight"]) for row in rows[:4]] == [
        ("tune", "plain", 0, 0.05, None), ("tune", "plain", 0, 0.1, None),
        ("tune", "ensemble", 0, 0.05, 0.3), ("tune", "ensemble", 0, 0.1, 0.3)]
    assert [(row["phase"], row["method"], row["seed"], row["weight"]) for row in rows[4:7]] == [
        ("tune", "ensemble", 0, 0.5), ("tune", "ensemble", 0, 0.7), ("test", "plain", 1, None)]
    for tested, tuned in ((rows[6], rows[:2]), (rows[7], rows[2:6])):
        best = max(tuned, key=lambda row: row["top1"][-1])
        assert (tested["lr"], tested["weight"]) == (best["lr"], best["weight"])
    assert len(rows[7]["top1"]) == 4
    assert [row["images"] for row in rows] == [199] * len(rows)  # the sample has one image only of one class
    assert 1 < rows[6]["memory_mb"] < rows[7]["memory_mb"] < 1.3 * rows[6]["memory_mb"]
    output.write_text("\n".join(output.read_text().splitlines()[:-1]) + '\n{"phase": "test", "set')
    with pytest.warns(UserWarning, match="skipped a line that was cut short"):
        again, _ = tiny("--methods", "plain", "ensemble", "--seeds", "1")
    assert len(again) == len(rows)
    assert again[-1]["top1"] == rows[-1]["top1"]  # the same seed gives the same network


def test_runs_at_the_same_time(benchmarks, tmp_path, monkeypatch):
    """The processes of --jobs find the data set in the working directory; the lines are those of one after another."""
    (tmp_path / "output/typefaces").mkdir(parents=True)
    (tmp_path / "output/typefaces/families").symlink_to(ROOT / "tests/data/typefaces")
    monkeypatch.chdir(tmp_path)
    evidence, grid = map(benchmarks, ("evidence", "evidence_grid"))
    monkeypatch.setitem(grid.SETTINGS, "tiny", grid.Setting("families", 2, "resnet10-16", 5))
    monkeypatch.setattr(evidence, "LRS", (0.05, 0.1))
    monkeypatch.setattr(evidence, "WEIGHT_DECAYS", (5e-4,))
    found = []
    for jobs in "12":
        monkeypatch.setattr(sys, "argv", ["evidence.py", "--settings", "tiny", "--methods", "plain", "--seeds", "2",
                                          "--jobs", jobs, "--output", f"{jobs}.jsonl"])
        evidence.main()
        rows = evidence.read_lines(tmp_path / f"{jobs}.jsonl")
        found.append({(row["phase"], row["seed"], row["lr"]): row["top1"] for row in rows})
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_methods_with_another_network(benchmarks, tiny, monkeypatch):
    grid = benchmarks("evidence_grid")
    monkeypatch.setitem(grid.TEACHERS, "resnet10-16", "resnet10-32")
    monkeypatch.setattr(benchmarks("evidence"), "LRS", (0.05,))
    for name in ("dml", "at"):
        monkeypatch.setitem(grid.METHODS, name, grid.METHODS[name]._replace(weights=grid.METHODS[name].weights[:1]))
    rows, output = tiny("--methods", "dml", "at", "--seeds", "1")
    tested = {row["method"]: row for row in rows if row["phase"] == "test"}
    assert [len(row["top1"]) for row in tested.values()] == [1, 1]
    assert tested["at"]["teacher_seconds"] > 0
    assert "teacher_seconds" not in tested["dml"]
    assert sorted(path.name for path in output.with_suffix("").iterdir()) == ["tiny-0.pt", "tiny-1.pt"]


def test_a_choice_is_trained_at_the_point_of_its_method(tiny):
    rows, _ = tiny("--methods", "ensemble-t1", "--seeds", "1")
    assert [row["method"] for row in rows] == ["ensemble"] * 4 + ["ensemble-t1"]
    best = max(rows[:4], key=lambda row: row["top1"][-1])
    assert [rows[4][name] for name in ("lr", "weight_decay", "weight")] == [
        best[name] for name in ("lr", "weight_decay", "weight")]


def test_labels_of_shallow_exits_fade(benchmarks):
    loss = benchmarks("evidence_grid").FadingLoss(updates=2, alpha=0.5, hint=None)
    logits = tuple(torch.tensor([[value, 0.0]], requires_grad=True) for value in (1.0, 2.0, 3.0))
    output, target = SelfDistillOutput(logits, logits), torch.tensor([0])
    ce = [cross_entropy(value, target).item() for value in logits]
    labels = [loss.terms(output, target)["label"].item() for _ in range(4)]
    assert labels == pytest.approx([ce[2] + share * 0.5 * (ce[0] + ce[1]) for share in (1, 0.5, 0, 0)])


def test_a_point_of_the_grid_that_diverges_is_not_chosen(benchmarks, tiny, monkeypatch):
    evidence = benchmarks("evidence")
    monkeypatch.setattr(evidence, "LRS", (1e6, 0.05))
    rows, _ = tiny("--methods", "plain", "--seeds", "1")
    assert "is nan at update" in rows[0]["diverged"]
    assert rows[2]["lr"] == 0.05


def test_the_time_is_up(tiny, capsys):
    with pytest.raises(SystemExit, match="0"):
        tiny("--methods", "plain", "--minutes", "0")
    assert "the time is up; the same command goes on" in capsys.readouterr().out


def test_typefaces_that_are_not_there(benchmarks, tmp_path, monkeypatch):
    data = benchmarks("evidence_data")
    monkeypatch.setattr(data, "TYPEFACES", tmp_path)
    with pytest.raises(FileNotFoundError, match="is not there; make it with python benchmarks/typefaces.py"):
        data.load_training("families", 2, 0)
