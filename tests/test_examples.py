"""The examples as a user runs them."""

import csv
import json
import os
import re
import signal
import time

import pytest
import timm
import torch
from PIL import Image

from timm_selfdistill import SelfDistillModel, load_images

from .conftest import EMBEDDED, TWO_PROCESSES, programs, run_python, wait_for

TRAIN = "examples/train.py"


def fast(data, output, *more: object) -> list:
    return [
        TRAIN,
        "--data-dir",
        data,
        "--output",
        output,
        "--model",
        "test_resnet",
        "--epochs",
        2,
        "-b",
        32,
        "-j",
        1,
        *more,
    ]


def last_metrics(output) -> dict:
    return {row["exit"]: row for row in json.loads((output / "summary.json").read_text())["exits"]}


def check_saved(run) -> None:
    """Both readers load the run's best model, and their logits are equal."""
    x = torch.randn(2, 3, 32, 32)
    plain = timm.create_model(f"local-dir:{run}/best", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(x), SelfDistillModel.from_pretrained(run / "best")(x))
    assert plain.pretrained_cfg["label_names"][9] == "Ankle boot"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_a_flag_it_reaches_80_percent_on_real_images(tmp_path):
    run_python(TRAIN, "--output", tmp_path / "run", limit=1100)
    assert last_metrics(tmp_path / "run")[3]["top1"] >= 80
    check_saved(tmp_path / "run")


def test_a_run_prints_its_table_and_what_comes_next(few_images, tmp_path):
    done = run_python(*fast(few_images, tmp_path / "run", "--epochs", 1), fresh=True)
    assert done.stderr == ""  # importing and reading the images says nothing
    for part in (
        "test_resnet: epoch 1, the best of 1",
        "exit",
        "top-1 %",
        "MACs",
        "share",
        "speed-up",
        "ensemble",
        f"SelfDistillModel.from_pretrained('{tmp_path}/run/best')",
        f"--output {tmp_path}/run ",
        f"--baseline --output {tmp_path}/run-baseline",
    ):
        assert part in done.stdout
    for row in last_metrics(tmp_path / "run").values():
        assert f"{row['top1']:.2f}" in done.stdout
    for picture in ("curves.png", "exits.png", "best/exits.png", "last/exits.png"):
        assert len(set(Image.open(tmp_path / "run" / picture).convert("L").getdata())) > 50  # drawn, not blank
    assert "\x1b" not in done.stdout
    check_saved(tmp_path / "run")


def test_the_plain_network_trains_in_the_same_loop(few_images, tmp_path):
    done = run_python(*fast(few_images, tmp_path / "run", "--baseline"))
    assert list(last_metrics(tmp_path / "run")) == [0]
    assert "distill" not in (tmp_path / "run" / "history.csv").read_text().splitlines()[0]
    assert "ensemble" not in done.stdout


def test_many_flags_at_once(few_images, tmp_path):
    run_python(
        *fast(
            few_images,
            tmp_path / "run",
            "--exits",
            "layer1",
            "3",
            "--head",
            "linear",
            "--temperature",
            2,
            "--alpha",
            0.5,
            "--beta",
            0.1,
            "--hint",
            "pooled",
            "--teacher",
            "ensemble",
            "--t-squared",
            "--opt",
            "adamw",
            "--lr",
            1e-3,
            "--sched",
            "poly",
            "--warmup-epochs",
            0,
            "--weight-decay",
            0.05,
            "--smoothing",
            0.1,
            "--mixup",
            0.2,
            "--cutmix",
            1.0,
            "--aa",
            "rand-m9",
            "--reprob",
            0.25,
            "--model-ema",
            "--model-ema-warmup",
            "--amp",
            "--amp-dtype",
            "bfloat16",
            "--grad-accum-steps",
            2,
            "--clip-grad",
            1.0,
            "--seed",
            7,
            "--in-chans",
            3,
            "--img-size",
            40,
            "--channels-last",
        )
    )
    assert list(last_metrics(tmp_path / "run")) == [0, 1, 2, "ensemble"]
    saved = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert saved["self_distill"]["exits"] == [1, 3]
    assert saved["pretrained_cfg"]["input_size"] == [3, 40, 40]


@pytest.mark.slow
def test_accelerate_launch(few_images, tmp_path):
    done = run_python(*fast(few_images, tmp_path / "run", "--epochs", 1), launcher=("-m", "accelerate.commands.launch"))
    assert "epoch 1, the best of 1" in done.stdout


@pytest.mark.slow
def test_two_processes_train_one_model(few_images, tmp_path):
    flags = fast(few_images, tmp_path / "two", "--amp", "--amp-dtype", "bfloat16", "--grad-accum-steps", 2, "-b", 16)
    done = run_python(*flags, launcher=TWO_PROCESSES)
    assert len(re.findall(r"^epoch 1/2 ", done.stdout, re.MULTILINE)) == 1
    assert done.stdout.count(", the best of 2") == 1
    states = [torch.load(path, weights_only=True) for path in (tmp_path / "two" / "checkpoints").glob("*/run.pt")]
    assert [len(state["random"]) for state in states] == [2, 2]  # epochs, and processes
    metrics = last_metrics(tmp_path / "two")
    hits = metrics[3]["top1"] * 101 / 100  # each of the 101 test images counted once
    assert hits == pytest.approx(round(hits), abs=1e-6)

    run_python(
        *fast(few_images, "", "--resume", tmp_path / "two", "--epochs", 3, "-b", 16, "--grad-accum-steps", 2),
        processes=2,
    )
    assert [row["epoch"] for row in csv.DictReader((tmp_path / "two" / "history.csv").open())] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_group_saves_a_checkpoint_and_says_how_to_go_on(number, code, few_images, tmp_path):
    run = programs().start(*fast(few_images, tmp_path / "run", "--epochs", 400))
    history = tmp_path / "run" / "history.csv"
    wait_for(lambda: history.exists() or run.poll() is not None)
    os.killpg(run.pids[0], number)  # the loading processes get it too
    done = run.wait()
    assert done.returncode == code, done.stderr
    assert f"stopped by {number.name}" in done.stdout
    assert f"--resume {tmp_path}/run" in done.stdout
    for picture in ("curves.png", "best/exits.png", "last/exits.png"):
        assert (tmp_path / "run" / picture).exists()

    epochs = len(history.read_text().splitlines()) - 1
    done = run_python(*fast(few_images, tmp_path / "run", "--epochs", epochs + 1, "--resume"))
    assert re.search(rf"resumed .*step-\d+: epoch {epochs + 1}, update \d+", done.stdout)
    rows = list(csv.DictReader(history.open()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 2))
    losses = [float(row["train_loss"]) for row in rows]
    assert losses[-1] < losses[0]


def test_the_help_comes_alone():
    done = run_python(TRAIN, "--help")
    assert "--teacher {deepest,ensemble,memory}" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exits", "9"], r"ResNet .*level 9 .*0 \(act1\)"),
        (["--amp"], "fp16 .*GPU.*bfloat16"),
        (["--opt", "foo"], "unknown optimizer 'foo'"),
        (["--head", "foo"], "unknown head 'foo'"),
        (["--hint", "foo"], "--hint: .*'foo'"),
        (["--resume"], "nothing to resume"),
        (["--data-dir", "nowhere"], "nowhere .*folder or file.* dataset"),
        (["--lr", "1e30", "--warmup-epochs", "0"], r"loss is nan at update \d+ .*lower lr"),
        (["--model", "resnet1"], r"timm has no model resnet1; did you mean resnet18"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(flags, message, few_images, tmp_path):
    done = run_python(*fast(few_images, tmp_path / "run", *flags), check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: error: ")
    assert re.search(message, done.stderr.strip().splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreadable_image_in_a_loading_process_is_named(tmp_path):
    image = load_images(EMBEDDED).train[0]["image"]
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(40):
            image.save(tmp_path / "images" / name / f"{index}.png")
    broken = tmp_path / "images" / "a" / "17.png"
    broken.write_bytes(b"no image")
    done = run_python(*fast(tmp_path / "images", tmp_path / "run"), check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"train.py: error: cannot read image {broken}")


@pytest.mark.benchmark
def test_the_step_benchmark_runs(tmp_path):
    run_python(
        "benchmarks/step.py",
        "--rounds",
        1,
        "--seconds",
        0,
        "-b",
        2,
        "--cases",
        "resnet18, 32 px",
        "--output",
        tmp_path / "a.json",
    )
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert 1 < row["macs_ratio"] <= 1.048


@pytest.mark.benchmark
def test_the_training_benchmark_runs(tmp_path):
    run_python(
        "benchmarks/train.py",
        "--rounds",
        1,
        "--images",
        32,
        "-b",
        16,
        "--models",
        "resnet18",
        "--img-size",
        32,
        "-j",
        0,
        "--output",
        tmp_path / "a.json",
    )
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["plain_over_timm"] > 0
    assert 1 < row["memory_ratio"] < 1.15


@pytest.mark.benchmark
def test_the_benchmark_of_frozen_backbones_runs(tmp_path):
    run_python(
        "benchmarks/frozen.py",
        "--rounds",
        1,
        "--images",
        32,
        "-b",
        16,
        "--models",
        "resnet18",
        "--img-size",
        32,
        "--output",
        tmp_path / "a.json",
    )
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["frozen_ms"] > 0
    assert row["forward_ms"] > 0
    assert 1 < row["memory_ratio"] < 1.2


@pytest.mark.benchmark
def test_the_benchmark_of_analyses_runs(tmp_path):
    run_python(
        "benchmarks/analysis.py",
        "--rounds",
        1,
        "--images",
        64,
        "-b",
        32,
        "--num-classes",
        10,
        "--output",
        tmp_path / "a.json",
    )
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["analysis"] for row in rows] == ["separability", "agreement", "flat-minima"]
    assert all(row["forward_s"] > 0 and row["analysis_s"] > 0 for row in rows)


@pytest.mark.benchmark
def test_the_benchmark_of_training_time_runs(tmp_path):
    run_python("benchmarks/training_time.py", "--rounds", 1, "--seconds", 0, "-b", 4, "--output", tmp_path / "a.json")
    rows = {row["method"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert rows["plain"]["time"] == 1
    taught = {name for name, row in rows.items() if row["with_teacher"] > row["time"]}
    assert taught == {"kd", "fitnet", "at"}
    assert rows["kd"]["with_teacher"] == pytest.approx(rows["kd"]["time"] + rows["teacher"]["time"])


@pytest.mark.benchmark
def test_the_parts_of_a_run_are_timed(tmp_path):
    command = ["--data-dir", EMBEDDED, "--model", "test_resnet", "--method", "plain", "--epochs", 1, "-b", 64, "-j", 0]
    record = tmp_path / "parts.json"
    began = repr(time.time())
    run_python("benchmarks/run.py", "--timed", record, *command, "--output", tmp_path / "run", fresh=True, BEGAN=began)
    parts = json.loads(record.read_text())
    assert list(parts) == ["start", "loading", "steps", "evaluation", "saving", "pictures"]
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) < time.time() - float(began)
