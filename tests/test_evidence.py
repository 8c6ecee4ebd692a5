"""The runs, tables and picture of benchmarks/evidence.py."""

import json
import re
import sys

import pytest
import torch
from timm.utils import unwrap_model
from torch.nn.functional import cross_entropy

from timm_selfdistill.output import SelfDistillOutput
from timm_selfdistill.training.loop.memory import nothing_remembered

from .conftest import ROOT, run_python

METHODS = [
    "plain",
    "dsn",
    "paper",
    "deepest",
    "ensemble",
    "memory",
    "memory-m3-half",
    "dks",
    "dml",
    "kd",
    "fitnet",
    "at",
    "ensemble-t1",
    "ensemble-not-squared",
    "ensemble-map",
    "ensemble-linear",
    "ensemble-fading",
    "dsn-fading",
]
HARDWARE = {"device": "AMD EPYC", "threads": 1, "torch": "2.14.1"}


@pytest.fixture
def tables(benchmarks):
    return benchmarks("evidence_tables")


@pytest.fixture
def tiny(benchmarks, monkeypatch, tmp_path, learning_rates):
    """`evidence.main` on two images of each class of the sample, for five passes."""
    evidence, grid, data = map(benchmarks, ("evidence", "evidence_grid", "evidence_data"))
    monkeypatch.setitem(data.DATA, "typefaces", 100)
    monkeypatch.setattr(data, "TYPEFACES", ROOT / "tests/data")
    monkeypatch.setitem(grid.SETTINGS, "tiny", grid.Setting("typefaces", 2, "resnet10-16", 5))
    learning_rates(0.05, 0.1)

    def run(*flags):
        output = tmp_path / "lines.jsonl"
        monkeypatch.setattr(sys, "argv", ["evidence.py", "--settings", "tiny", "--output", str(output), *flags])
        evidence.main()
        return [json.loads(line) for line in output.read_text().splitlines() if line.endswith("}")], output

    return run


@pytest.fixture(autouse=True)
def _small_grid(learning_rates):
    learning_rates(0.1, 0.2)


def row(method, seed, top1, ensemble=None, **more):
    return {
        "phase": "test",
        "setting": "families-30",
        "data": "families",
        "per_class": 30,
        "network": "resnet10-16",
        "passes": 60,
        "method": method,
        "seed": seed,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "weight": None,
        "top1": top1,
        "ensemble": ensemble,
        "images": 3000,
        "seconds": 60.0 + seed,
        "memory_mb": 19.4,
        "amp_dtype": None,
        "hardware": HARDWARE,
        "data_sha256": "0",
        **more,
    }


def tuned(method, weights=(None,)):
    """A learning rate of 0.1 and the second weight are best."""
    shared = [row(method, 0, [top1], phase="tune", lr=lr, weight=weights[0]) for lr, top1 in ((0.1, 40.0), (0.2, 39.0))]
    return shared + [
        row(method, 0, [top1], phase="tune", weight=weight) for weight, top1 in zip(weights[1:], (41.0, 40.5))
    ]


def three_seeds():
    return [
        *tuned("plain"),
        *(row("plain", seed, [40.0 + seed]) for seed in (1, 2, 3)),
        *tuned("dsn"),
        *(row("dsn", seed, [30.0, 42.0 + 1.5 * seed], 44.0 + seed, seconds=80.0) for seed in (1, 2, 3)),
        *tuned("kd", (1.0, 0.3, 3.0)),
        *(
            row("kd", seed, [44.0 + 2 * seed], weight=0.3, teacher_seconds=200.0, teacher_top1=50.0 + seed)
            for seed in (1, 2, 3)
        ),
    ]


def table_of(tables, rows):
    return tables.format_table(rows, "families-30", tables.collect(rows, "families-30", "test"))


def test_a_table_from_its_lines(tables):
    assert table_of(tables, three_seeds()).splitlines() == [
        "| method | lr, weight decay, own weight | exits, shallow to deep | ensemble | deepest - plain | deepest - dsn"
        " | seconds | with teacher | MB |",
        "|---|---|---|---|---|---|---|---|---|",
        "| plain | 0.1, 0.0005 | 42.00 ± 2.48 |  |  | -3.00 ± 1.24 (p 0.0091) | 62 | 62 | 19 |",
        "| dsn | 0.1, 0.0005 | 30.00 ± 0.00, 45.00 ± 3.73 | 46.00 ± 2.48 | +3.00 ± 1.24 (p 0.0091) |  | 80 | 80 | 19 |",
        "| kd | 0.1, 0.0005, 0.3 | 48.00 ± 4.97 |  | +6.00 ± 2.48 (p 0.0091) | +3.00 ± 1.24 (p 0.0091) | 62 | 262 |"
        " 19 |",
        "",
        "3,000 training images of families, 60 passes, resnet10-16; 3 seeds; test images. Teacher: resnet10-32,"
        " 52.00 ± 2.48 (+10.00 ± 0.00 over plain). device AMD EPYC, threads 1, torch 2.14.1, float32.",
    ]


def test_a_table_shows_the_point_that_tuning_chose(tables):
    """Lines of another point, another number of passes or a tuning that is not complete are left out."""
    rows = [
        *three_seeds(),
        row("plain", 4, [90.0], lr=0.2),
        row("plain", 1, [90.0], passes=15),
        *tuned("paper", (0.3, 0.5, 0.7))[:-1],
        row("paper", 1, [90.0], weight=0.5),
    ]
    with pytest.warns(UserWarning, match="families-30: paper .*tuning"):
        assert table_of(tables, rows) == table_of(tables, three_seeds())


def test_self_distillation_against_its_rivals(tables):
    rows = [
        *three_seeds(),
        *tuned("paper", (0.3, 0.5, 0.7)),
        *(row("paper", seed, [45.0 + seed], weight=0.5) for seed in (1, 2, 3)),
    ]
    tested = tables.collect(rows, "families-30", "test")
    assert tables.format_rivals(tested, ["kd"]).splitlines() == [
        "| other | paper - other | ensemble - other |",
        "|---|---|---|",
        "| kd | -1.00 ± 2.48 (p 0.23) |  |",
    ]


def test_each_exit_against_deep_supervision(tables):
    settings = {
        "families-30": tables.collect(
            [
                *three_seeds(),
                *tuned("paper", (0.3, 0.5, 0.7)),
                *(row("paper", seed, [31.0, 42.0 + 2 * seed], 43.0 + seed, weight=0.5) for seed in (1, 2, 3)),
            ],
            "families-30",
            "test",
        )
    }
    assert tables.format_depths(settings).splitlines() == [
        "| setting | method | exits - dsn's, shallow to deep | ensemble - dsn's |",
        "|---|---|---|---|",
        "| families-30 | paper | +1.00 ± 0.00, +1.00 ± 1.24 | -1.00 ± 0.00 |",
    ]
    assert len(tables.format_depths({"families-30": {}}).splitlines()) == 2


def test_choices_are_differences_to_their_method(tables):
    rows = [
        *tuned("ensemble", (0.3, 0.5, 0.7)),
        *(row("ensemble", seed, [30.0, 40.0 + seed], 42.0, phase="choose", weight=0.5) for seed in (1, 2, 3)),
        *(row("ensemble-t1", seed, [30.0, 38.0 + 2 * seed], 41.0, phase="choose", weight=0.5) for seed in (1, 2, 3)),
    ]
    lines = tables.format_choices(rows, "families-30", tables.collect(rows, "families-30", "choose")).splitlines()
    assert lines[2:4] == [
        "| ensemble | 30.00 ± 0.00, 42.00 ± 2.48 | 42.00 ± 0.00 |  |",
        "| ensemble-t1 | 30.00 ± 0.00, 42.00 ± 4.97 | 41.00 ± 0.00 | +0.00 ± 2.48 (p 1) |",
    ]
    assert "3 seeds; validation images" in lines[-1]


def test_runs_that_diverged_are_counted_and_left_out(tables):
    rows = [*three_seeds(), row("dsn", 4, [0.0], diverged="loss is nan"), row("plain", 4, [44.0])]
    assert "4 seeds, 3 of kd; test images." in table_of(tables, rows)
    assert "| dsn (1 of 4 seeds diverged) | 0.1, 0.0005 | 30.00 ± 0.00, 45.00 ± 3.73 |" in table_of(tables, rows)


def test_one_seed_has_no_interval(tables):
    table = table_of(
        tables,
        [*tuned("plain"), row("plain", 1, [41.0]), *tuned("dsn"), row("dsn", 1, [30.0, 43.0], 44.0, seconds=None)],
    )
    assert "| dsn | 0.1, 0.0005 | 30.00, 43.00 | 44.00 | +2.00 (1 seed) |  |  |  | 19 |" in table
    assert "1 seed; test images. No interval" in table


@pytest.mark.parametrize("changes", [{"hardware": HARDWARE | {"torch": "2.15.0"}}, {"amp_dtype": "bfloat16"}])
@pytest.mark.parametrize("phase", ["tune", "test"])
def test_lines_of_different_machines_are_marked(tables, changes, phase):
    rows = [line | (changes if line["phase"] == phase else {}) for line in tuned("plain") + [row("plain", 1, [41.0])]]
    assert re.search(r"\*\*Mixed: .* 2 kinds of hardware", table_of(tables, rows))


def test_lines_of_different_images_are_marked(tables):
    rows = [*tuned("plain"), row("plain", 1, [41.0]), row("plain", 2, [42.0], data_sha256="1")]
    assert re.search(r"\*\*Mixed: .* different images", table_of(tables, rows))


def test_page_and_picture(tables, tmp_path, monkeypatch):
    lines, page, picture = tmp_path / "evidence.jsonl", tmp_path / "page.md", tmp_path / "gain.png"
    lines.write_text("\n".join(map(json.dumps, three_seeds())) + '\n{"phase": "test", "set')
    page.write_text(
        "Before\n<!-- table families-30 -->\nold\n<!-- end -->\nAfter\n"
        "<!-- table rivals families-30 -->\n<!-- end -->\n<!-- table depths -->\n<!-- end -->\n"
    )
    monkeypatch.setattr(sys, "argv", ["x", str(lines), "--page", str(page), "--picture", str(picture)])
    with pytest.warns(UserWarning, match=r'evidence\.jsonl.*"phase": "test", "set$'):
        tables.main()
    text = page.read_text()
    assert text.startswith("Before\n<!-- table families-30 -->\n| method |")
    assert " torch 2.14.1, float32.\n<!-- end -->\nAfter\n<!-- table rivals families-30 -->\n| other |" in text
    assert "| kd |  |  |\n<!-- end -->\n<!-- table depths -->\n| setting |" in text
    assert "old" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_gains(benchmarks, tables):
    collected = {"families-30": tables.collect(three_seeds(), "families-30", "test")}
    assert benchmarks("evidence_picture").gains(collected, "dsn") == [
        ("families-30", 30.0, 3.0, pytest.approx(1.24, abs=0.01))
    ]


def test_a_row_of_the_picture_says_what_was_trained(benchmarks):
    picture = benchmarks("evidence_picture")
    assert picture.describe("families-30", 30.0) == "30 images per typeface,\n60 epochs"
    assert picture.describe("characters-10-narrow", 10.0) == "10 images per character,\n100 epochs, resnet10-8"


def test_a_table_without_a_place_on_the_page(tables):
    with pytest.warns(UserWarning, match="the page .* fashion;"):
        assert tables.insert("page", {"fashion": "| table |"}) == "page"


def test_no_lines(tmp_path):
    done = run_python("benchmarks/evidence_tables.py", tmp_path / "none.jsonl", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search(r"none\.jsonl; .*python benchmarks/evidence\.py", done.stderr)


@pytest.mark.benchmark
def test_a_run_that_was_cut_short_is_done_again(tiny):
    rows, output = tiny("--methods", "plain", "ensemble", "--seeds", "1")
    assert [(row["phase"], row["method"], row["seed"], row["lr"], row["weight"]) for row in rows[:4]] == [
        ("tune", "plain", 0, 0.05, None),
        ("tune", "plain", 0, 0.1, None),
        ("tune", "ensemble", 0, 0.05, 0.3),
        ("tune", "ensemble", 0, 0.1, 0.3),
    ]
    assert [(row["phase"], row["method"], row["seed"], row["weight"]) for row in rows[4:7]] == [
        ("tune", "ensemble", 0, 0.5),
        ("tune", "ensemble", 0, 0.7),
        ("test", "plain", 1, None),
    ]
    for tested, tuned in ((rows[6], rows[:2]), (rows[7], rows[2:6])):
        best = max(tuned, key=lambda row: row["top1"][-1])
        assert (tested["lr"], tested["weight"]) == (best["lr"], best["weight"])
    assert len(rows[7]["top1"]) == 4
    assert [row["images"] for row in rows] == [199] * len(rows)  # the sample has one image only of one class
    assert 1 < rows[6]["memory_mb"] < rows[7]["memory_mb"] < 1.3 * rows[6]["memory_mb"]
    output.write_text("\n".join(output.read_text().splitlines()[:-1]) + '\n{"phase": "test", "set')
    with pytest.warns(UserWarning, match=r'lines\.jsonl.*"phase": "test", "set$'):
        again, _ = tiny("--methods", "plain", "ensemble", "--seeds", "1")
    assert len(again) == len(rows)
    assert again[-1]["top1"] == rows[-1]["top1"]  # the same seed gives the same network


@pytest.mark.benchmark
def test_runs_at_the_same_time(benchmarks, tmp_path, monkeypatch, learning_rates):
    """The processes of --jobs find the data set in the working directory; the lines are those of one after another."""
    (tmp_path / "output/typefaces").mkdir(parents=True)
    (tmp_path / "output/typefaces/families").symlink_to(ROOT / "tests/data/typefaces")
    monkeypatch.chdir(tmp_path)
    evidence, grid = map(benchmarks, ("evidence", "evidence_grid"))
    monkeypatch.setitem(grid.SETTINGS, "tiny", grid.Setting("families", 2, "resnet10-16", 5))
    learning_rates(0.05, 0.1)
    found = []
    for jobs in "12":
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "evidence.py",
                "--settings",
                "tiny",
                "--methods",
                "plain",
                "--seeds",
                "2",
                "--jobs",
                jobs,
                "--output",
                f"{jobs}.jsonl",
            ],
        )
        evidence.main()
        rows = evidence.read_lines(tmp_path / f"{jobs}.jsonl")
        found.append({(row["phase"], row["seed"], row["lr"]): row["top1"] for row in rows})
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.benchmark
def test_methods_with_another_network(benchmarks, tiny, monkeypatch, learning_rates):
    grid = benchmarks("evidence_grid")
    monkeypatch.setitem(grid.TEACHERS, "resnet10-16", "resnet10-32")
    learning_rates(0.05)
    for name in ("dml", "at"):
        monkeypatch.setitem(grid.METHODS, name, grid.METHODS[name]._replace(weights=grid.METHODS[name].weights[:1]))
    rows, output = tiny("--methods", "dml", "at", "--seeds", "1")
    tested = {row["method"]: row for row in rows if row["phase"] == "test"}
    assert [len(row["top1"]) for row in tested.values()] == [1, 1]
    assert tested["at"]["teacher_seconds"] > 0
    assert "teacher_seconds" not in tested["dml"]
    assert sorted(path.name for path in output.with_suffix("").iterdir()) == ["tiny-0.pt", "tiny-1.pt"]


@pytest.mark.benchmark
def test_a_memory_is_of_images_not_of_their_places_in_the_passes(benchmarks, tiny, monkeypatch):
    runs, made = benchmarks("evidence_runs"), []
    create = runs.create_trainer
    monkeypatch.setattr(runs, "create_trainer", lambda *args, **more: made.append(create(*args, **more)) or made[-1])
    rows, _ = tiny("--methods", "memory-m3", "--seeds", "1")
    assert "teacher='memory', t_squared=True, memory_momentum=0.3" in rows[0]["criterion"]
    counts = made[0].memory.memory.state_dict()["counts"]
    assert len(counts) == rows[0]["images"]
    assert counts.max() > 1


@pytest.mark.benchmark
def test_a_choice_is_trained_at_the_point_of_its_method(tiny):
    rows, _ = tiny("--methods", "ensemble-t1", "--seeds", "1")
    assert [row["method"] for row in rows] == ["ensemble"] * 4 + ["ensemble-t1"]
    best = max(rows[:4], key=lambda row: row["top1"][-1])
    assert [rows[4][name] for name in ("lr", "weight_decay", "weight")] == [
        best[name] for name in ("lr", "weight_decay", "weight")
    ]


def test_labels_of_shallow_exits_fade(benchmarks):
    loss = benchmarks("evidence_grid").FadingLoss(updates=2, alpha=0.5, teacher="deepest")
    logits = tuple(torch.tensor([[value, 0.0]], requires_grad=True) for value in (1.0, 2.0, 3.0))
    output, target = SelfDistillOutput(logits, logits), torch.tensor([0])
    ce = [cross_entropy(value, target).item() for value in logits]
    labels = [loss.terms(output, target)["label"].item() for _ in range(4)]
    assert labels == pytest.approx([ce[2] + share * 0.5 * (ce[0] + ce[1]) for share in (1, 0.5, 0, 0)])


@pytest.mark.benchmark
def test_a_point_of_the_grid_that_diverges_is_not_chosen(tiny, learning_rates):
    learning_rates(1e6, 0.05)
    rows, _ = tiny("--methods", "plain", "--seeds", "1")
    assert "is nan at update" in rows[0]["diverged"]
    assert rows[2]["lr"] == 0.05


@pytest.mark.benchmark
def test_a_teacher_that_lost_its_weights_is_trained_again(benchmarks, tiny, monkeypatch, learning_rates):
    learning_rates(0.05)
    grid = benchmarks("evidence_grid")
    monkeypatch.setitem(grid.METHODS, "kd", grid.METHODS["kd"]._replace(weights=(1.0,)))
    rows, output = tiny("--methods", "kd", "--seeds", "1")
    assert [(row["phase"], row["method"], row["network"], row["seed"]) for row in rows] == [
        ("tune", "teacher", "resnet10-32", 0),
        ("teacher", "teacher", "resnet10-32", 0),
        ("teacher", "teacher", "resnet10-32", 1),
        ("tune", "kd", "resnet10-16", 0),
        ("test", "kd", "resnet10-16", 1),
    ]
    assert rows[4]["teacher_top1"] == rows[2]["top1"][-1]
    output.with_suffix("").joinpath("tiny-1.pt").unlink()
    assert [(row["phase"], row["seed"]) for row in tiny("--methods", "kd", "--seeds", "1")[0][5:]] == [("teacher", 1)]


@pytest.mark.benchmark
def test_a_network_without_a_larger_one_to_teach_it(benchmarks, tiny, monkeypatch):
    monkeypatch.delitem(benchmarks("evidence_grid").TEACHERS, "resnet10-16")
    with pytest.raises(ValueError, match=r"resnet10-16 .*larger network.*evidence_grid\.TEACHERS"):
        tiny("--methods", "kd")


@pytest.mark.benchmark
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(benchmarks, method):
    grid = benchmarks("evidence_grid")
    spec = grid.METHODS[method]
    arguments = [grid.create_network("resnet10-16", "families"), grid.METHODS[spec.like or method].weights[0], 10]
    arguments += [grid.create_network("resnet10-32", "families")] if spec.other else []
    task = spec.make(*arguments).train()
    remembered = nothing_remembered(task, 4, grid.DATA["families"], "cpu")
    task(torch.randn(4, 1, 32, 32), torch.arange(4), *remembered)["loss"].backward()
    gradients = [weight.grad for weight in unwrap_model(task.trainable_module).parameters() if weight.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.benchmark
def test_the_time_is_up(tiny, capsys):
    with pytest.raises(SystemExit, match="0"):
        tiny("--methods", "plain", "--minutes", "0")
    assert re.search("the time is up; .*same command", capsys.readouterr().out)


def test_typefaces_that_are_not_there(benchmarks, tmp_path, monkeypatch):
    data = benchmarks("evidence_data")
    monkeypatch.setattr(data, "TYPEFACES", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"families/train\.parquet .*python benchmarks/typefaces\.py"):
        data.load_training("families", 2, 0)
