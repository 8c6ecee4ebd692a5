"""What a run says of its images, records, and takes up again."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from timm_selfdistill import hub
from timm_selfdistill.cli import read_record
from timm_selfdistill.training.data.images import value_ranges

from ...conftest import ROOT, run_python
from .test_bad_samples import train
from .test_layouts import make


def test_a_run_says_and_records_what_was_found(photos):
    make(photos, "train/{cat,dog}/{1..8}.jpg val/{cat,dog}/9.jpg test/{1..3}.jpg notes.md")
    folder = photos.resolve()
    lines = [
        f"train: 16 images of 2 classes in {folder}/train; left out: 3 images in test/ without a class, 1 .md",
        f"val: 2 images of 2 classes in {folder}/val",
        "read at 32 x 32 pixels (--img-size) with 3 channels (timm's default)",
        "all sampled images are grayscale: --in-chans 1 is enough",
    ]
    done = train("--no-aug")
    assert done.stdout.splitlines()[:4] == lines
    found = yaml.safe_load(Path("run/config.yaml").read_text())["found"]
    assert found["splits"][0] == {
        "split": "train",
        "images": 16,
        "classes": 2,
        "from": f"{folder}/train",
        "left_out": "3 images in test/ without a class, 1 .md",
    }
    assert found["read"] == lines[2:]
    assert str(folder) not in Path("run/best/config.json").read_text()

    again = run_python(
        ROOT / "examples/train.py",
        "--config",
        Path("run/config.yaml").resolve(),
        "--in-chans",
        1,
        "--output",
        Path("again").resolve(),
    )
    assert again.stdout.splitlines()[2:4] == [
        "read at 32 x 32 pixels (--img-size) with 1 channel (--in-chans)",
        next(line for line in again.stdout.splitlines() if "epoch 1/1" in line),
    ]


def test_the_size_and_a_new_classifier_are_explained(photos):
    make(photos, "{cat,dog}/{1..20}.jpg")
    flags = [ROOT / "examples/train.py", "--data-dir", photos.resolve(), "-b", 8, "-j", 0, "--epochs", 1]
    done = run_python(*flags, "--model", "test_resnet", "--output", Path("run").resolve())
    assert "read at 32 x 32 pixels (the median image is 8 x 8) with 3 channels" in done.stdout
    make(photos, "fish/{1..20}.jpg")
    model = f"local-dir:{Path('run/best').resolve()}"
    done = run_python(*flags, "--model", model, "--pretrained", "--output", Path("tuned").resolve())
    assert "read at 32 x 32 pixels (the model's size) with 3 channels" in done.stdout
    assert "the classifier is new: 3 classes instead of the 2 of the weights" in done.stdout
    refused = run_python(
        *flags,
        "--model",
        "local-dir:" + str(Path("tuned/best").resolve()),
        "--pretrained",
        "--data-dir",
        other(),
        "--output",
        Path("other").resolve(),
        check=False,
    )
    assert refused.returncode == 2
    assert "('cat', 'dog', 'fish'), but the images have 3 classes ('bus', 'cat', 'dog')" in refused.stderr
    assert "the network does not know 'bus';" in refused.stderr
    assert "--pretrained-path FILE" in refused.stderr


def test_a_run_is_not_resumed_with_other_classes(photos):
    make(photos, "train/{cat,dog}/{1..8}.jpg val/{cat,dog}/9.jpg")
    train()
    make(photos, "train/cat/10.jpg")
    resumed = train("--epochs", 2, "--resume")
    assert "epoch 2/2" in resumed.stdout
    assert "found" not in resumed.stderr
    for split in ("train", "val"):
        (photos / split / "cat").rename(photos / split / "zebra")
    refused = train("--epochs", 3, "--resume", check=False)
    assert refused.returncode == 2
    assert "on 2 classes ('cat', 'dog'), but the images have 2 classes ('dog', 'zebra');" in refused.stderr


def other() -> Path:
    make(Path("others"), "{bus,cat,dog}/{1..20}.jpg")
    return Path("others").resolve()


@pytest.mark.parametrize(
    ("high", "flags", "expected"), [(0.9, [], [0.0, 1.0]), (4095, ["--value-range", 0, 4095], [0.0, 4095.0])]
)
def test_what_is_black_and_white_is_recorded_and_obeyed(high, flags, expected, photos, command, recwarn):
    make(photos, "train/{cat,dog}/{1..8}.tif val/{cat,dog}/{9..12}.tif")
    for number, path in enumerate(sorted(photos.glob("*/*/*.tif"))):
        values = np.linspace(0, high, 64).reshape(8, 8) * (1 if "cat" in path.parts else 0.2 + 0.01 * number)
        Image.fromarray(values.astype(np.float32 if high < 1 else np.int32)).save(path)
    done = train("--input-key", ".tif", *flags)
    kind = "with more than 8 bits" if flags else "of floating-point numbers"
    assert f"in images {kind}, {expected[0]:g} is black and {expected[1]:g} is white" in done.stdout
    assert done.stderr.count("--value-range LOW HIGH") == (0 if flags else 1)
    settings = hub.read_metrics(Path("run/best"))["settings"]
    assert (settings["value_range"] if flags else settings["value_ranges"]["F"]) == expected
    known = value_ranges(read_record("run/best").value_range)
    assert list(known["F" if high < 1 else "I"]) == expected
    code, out, err = command("evaluate", "run", "--data", "photos", "--input-key", ".tif")
    assert (code, err) == (0, "")
    row = next(line for line in done.stdout.splitlines() if line.startswith("│ ensemble"))
    assert row.split("│")[3] in out  # the same top-1
