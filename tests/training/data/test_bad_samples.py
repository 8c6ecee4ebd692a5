"""An image that cannot be read ends a run or a command, or is left out and counted, in every one of them."""

import re
from pathlib import Path

import pytest

from timm_selfdistill import load_images

from ...conftest import ROOT, run_python, small_backbone
from .test_layouts import make


def train(*more: object, check: bool = True):
    return run_python(
        ROOT / "examples/train.py",
        "--data-dir",
        Path("photos").resolve(),
        "--model",
        "test_resnet",
        "--img-size",
        32,
        "-b",
        8,
        "-j",
        0,
        "--epochs",
        1,
        "--output",
        Path("run").resolve(),
        *more,
        check=check,
    )


@pytest.fixture
def with_damage(photos):
    """The first image for training and the first for validation are none; another one is cut off, one is empty."""
    make(photos, "train/{cat,dog}/{1..20}.jpg val/{cat,dog}/{1..160}.jpg")
    for name in ("train/cat/1.jpg", "val/cat/1.jpg"):
        (photos / name).write_bytes(b"<html>404</html>")
    (photos / "train/dog/7.jpg").write_bytes((photos / "train/dog/7.jpg").read_bytes()[:40])
    (photos / "val/dog/8.jpg").write_bytes(b"")
    return photos


def test_they_are_left_out_of_training_and_of_every_measurement(with_damage, command):
    done = train("--on-bad-sample", "skip")
    assert done.stdout.count("images replaced 2") == 1
    assert done.stderr == "warning: 2 validation images cannot be read and are skipped\n"
    for name, more in (
        ("evaluate", []),
        ("calibrate", ["--max-accuracy-drop", 100, "--output", "calibrated"]),
        ("tradeoff", ["--output", "tradeoff"]),
    ):
        code, out, err = command(name, "run", "--data", "photos", *more)  # as in the run's training
        assert code == 0, err
        assert "2 images could not be read and were skipped" in out
        code, out, err = command(name, "run", "--data", "photos", *more, "--on-bad-sample", "raise")
        assert code == 2
        assert err.startswith("timm-selfdistill: error: cannot read image photos/val/cat/1.jpg: ")
    assert "on 318 images" in command("evaluate", "run", "--data", "photos")[1]


def test_the_first_one_that_is_met_ends_a_run(with_damage):
    done = train(check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"train\.py: error: cannot read image .*photos/(train|val)/.*\n", done.stderr)


def test_a_sample_passes_them_over(with_damage):
    for path in with_damage.glob("train/*/*.jpg"):
        if path.name != "5.jpg":
            path.write_bytes(b"")
    assert load_images(with_damage).size == (8, 8)
    for path in with_damage.glob("train/*/5.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read image photos/train/"):
        load_images(with_damage).fitting_size(small_backbone())
