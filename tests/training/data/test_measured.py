"""Commands on a saved model measure the images that its run measured."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel

from timm_selfdistill import load_images
from timm_selfdistill.hub import read_metrics

from .test_bad_samples import train
from .test_layouts import make


def top1(out: str) -> list[str]:
    """Of every exit, as evaluate prints it."""
    return [line.split("│")[3].strip() for line in out.splitlines() if line.startswith("│")]


def recorded(folder: str = "run/best") -> list[str]:
    return [f"{row['top1']:.2f}" for row in read_metrics(Path(folder))["exits"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with 40 images, and a run that measured the eight of them that --seed 3 drew."""
    folder = tmp_path_factory.mktemp("trained")
    make(folder / "photos", "{cat,dog}/{1..20}.jpg")
    train("--data-dir", folder / "photos", "--output", folder / "run", "--seed", 3, "--val-fraction", 0.2)
    return folder


@pytest.fixture
def run(trained, photos):
    """A copy of it in the working directory, which tells that it was trained here."""
    shutil.copytree(trained / "photos", photos, dirs_exist_ok=True)
    shutil.copytree(trained / "run", "run")
    settings = Path("run/config.yaml").read_text()
    Path("run/config.yaml").write_text(settings.replace(str(trained), str(Path.cwd())))
    return Path("run")


@pytest.mark.parametrize(
    "data",
    [
        [],
        ["--data", "photos"],
        ["--data-dir", "./photos"],
        ["--data", "moved"],
        ["--data", "photos", "--seed", 3],
        ["--data", "photos", "--val-fraction", 0.2],
    ],
)
def test_the_runs_own_images(data, run, command):
    if "moved" in data:
        shutil.move("photos", "moved")
    code, out, err = command("evaluate", run, *data)
    assert (code, err) == (0, "")
    assert top1(out) == recorded()
    first = out.splitlines()[0]
    assert first.startswith("moved seems to contain the 40 images" if "moved" in data else "0.2 of train: 8 images")
    assert command("evaluate", "run/last", *data)[0] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--seed", 4],
            "about 80% of these images, drawn with --val-fraction 0.2 --seed 4; the run was validated on the"
            " 0.2 of train, drawn with seed 3",
        ),
        (["--val-fraction", 0.5], "about 80% of these images, drawn with --val-fraction 0.5 --seed 3;"),
        (["--val-split", "train"], "80% of these images, since train is its training split;"),
        (["--data", "photos", "--split", "train"], "80% of these images, since train is its training split;"),
    ],
)
def test_images_that_were_trained_on_are_named_first(flags, said, run, command):
    code, out, _ = command("evaluate", run, *flags)
    assert code == 0
    assert out.splitlines()[0].startswith(f"warning: run/best was trained on {said}")


def test_images_of_others_are_all_measured(run, command):
    make(Path("others"), "{cat,dog}/{1..6}.jpg")
    code, out, _ = command("evaluate", run, "--data", "others")
    assert code == 0
    first, second = out.splitlines()[:2]
    assert first.startswith("warning: run/best may have been trained on these images; its run used 32 images")
    assert second.startswith("train: 12 images of 2 classes in ")
    make(Path("divided"), "train/{cat,dog}/{1..6}.jpg test/{cat,dog}/1.jpg")
    assert command("evaluate", run, "--data", "divided")[1].startswith("test: 2 images")
    make(Path("alone"), "test/{cat,dog}/{1..2}.jpg")
    assert command("evaluate", run, "--data", "alone")[1].startswith("test: 4 images")


def test_images_that_have_changed_since(run, command):
    make(Path("photos"), "cat/21.jpg")
    code, out, err = command("evaluate", run)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "photos has 41 images, but had 40 when run/best was trained" in err
    code, out, _ = command("evaluate", run, "--val-split", "train")
    assert code == 0
    assert out.startswith("warning: run/best was trained on 80% of these images")
    shutil.rmtree("photos")
    code, _, err = command("evaluate", run)
    assert (code, err.count("\n")) == (2, 1)
    assert re.search("photos, the images of the run of run/best, does not exist; give --data-dir", err)


@pytest.mark.parametrize("flags", [[], ["--val-split", "train"], ["--seed", 5], ["--val-fraction", 0.5]])
def test_a_copy_that_has_changed_may_have_been_trained_on(flags, run, command):
    shutil.copytree("photos", "copy")
    shutil.copytree("run/best", "elsewhere/model")
    make(Path("copy"), "cat/21.jpg")
    for model in (run, "elsewhere/model"):
        code, out, _ = command("evaluate", model, "--data", "copy", *flags)
        assert code == 0
        assert "may have been trained on these images" in out.splitlines()[0]


def test_a_file_of_the_users_is_no_record(run, command):
    shutil.copytree("run/best", "mine/model")
    Path("mine/config.yaml").write_text("[my, own]")
    code, out, _ = command("evaluate", "mine/model", "--data", "photos")
    assert code == 0
    assert top1(out) == recorded()


def test_from_another_folder(run, command, monkeypatch):
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, out, _ = command("evaluate", "../run")
    assert code == 0
    assert top1(out) == recorded("../run/best")


def test_a_plain_network(photos, command):
    make(photos, "{cat,dog}/{1..20}.jpg")
    train("--method", "plain")
    code, out, _ = command("evaluate", "run")
    assert code == 0
    assert top1(out) == recorded()


def test_extensions_go_along_with_a_model(photos, command):
    make(photos, "{cat,dog}/{1..10}.jpg")
    for path in sorted(photos.glob("*/*.jpg"))[:8]:
        path.rename(path.with_suffix(".jpeg"))
    make(photos, "{cat,dog}/{1..4}.png")
    train("--input-key", ".jpg;.jpeg")
    assert read_metrics(Path("run/best"))["settings"]["input_key"] == ".jpg;.jpeg"


def test_a_validation_split_of_its_own(photos, command):
    make(photos, "train/{cat,dog}/{1..8}.jpg validation/{cat,dog}/{1..4}.jpg test/{cat,dog}/{1..4}.jpg")
    train("--val-split", "test")
    _, out, _ = command("evaluate", "run")
    assert out.startswith("test: 8 images")
    assert top1(out) == recorded()
    assert command("evaluate", "run", "--val-split", "validation")[1].startswith("validation: 8 images")
    said = "warning: run/best was trained on all of these images, since train is its training split"
    assert command("evaluate", "run", "--val-split", "train")[1].startswith(said)
    make(photos, "test/cat/5.jpg")
    changed = command("evaluate", "run")[1]
    assert changed.startswith("warning: the split test has 9 images, but had 8 when run/best was trained")


def test_a_run_directory_without_its_settings(run, command):
    Path("run/config.yaml").unlink()
    code, _, err = command("evaluate", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "run/best does not record the images of its run; give --data-dir FOLDER or --dataset NAME" in err
    code, out, _ = command("evaluate", run, "--data", "photos")
    assert code == 0
    assert out.startswith("photos seems to contain the 40 images of the run")
    assert top1(out) == recorded()


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "just words"])
def test_settings_that_are_damaged(text, run, command):
    Path("run/config.yaml").write_text(text)
    code, _, err = command("evaluate", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "run/config.yaml" in err


def test_columns_are_those_of_the_run(photos, command):
    for split in ("train", "val"):
        make(photos, f"{split}/{{1..8}}.jpg")
        rows = "".join(f"{index}.jpg,{'ab'[index % 2]},x\n" for index in range(1, 9))
        (photos / split / "metadata.csv").write_text(f"file_name,kind,other\n{rows}")
    train("--target-key", "kind")
    for flags in ([], ["--data", "photos"], ["--data", "photos", "--target-key", "kind"]):
        code, out, err = command("evaluate", "run", *flags)
        assert (code, err) == (0, "")
        assert top1(out) == recorded()


def test_preprocessing_given_by_hand_is_said(run, command):
    _, out, _ = command("evaluate", run, "--img-size", 64, "--crop-pct", 1.0)
    assert "run/best is evaluated with input_size 3, 64, 64 instead of 3, 32, 32, crop_pct 1.0 instead of 0.95" in out
    own = command("evaluate", run)[1]
    assert "is evaluated with" not in own


def test_reading_given_by_hand_is_said(run, command):
    _, out, _ = command("evaluate", run, "--value-range", 0, 100, "--input-key", ".jpg")
    assert "read with --input-key .jpg instead of none, --value-range 0, 100 instead of none in the run" in out
    assert "read with" not in command("evaluate", run, "--train-split", "train")[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--val-split", "train", "--val-fraction", 0.2],
            "--val-split train evaluates a whole split, but --val-fraction 0.2 a part",
        ),
        (["--val-split", "train", "--train-split", "train", "--seed", 3], "but --train-split train --seed 3 a part"),
        (["--data-dir", "photos", "--dataset", "user/photos"], "--data-dir photos and --dataset user/photos exclude"),
    ],
)
def test_flags_that_contradict_are_refused(flags, said, run, command):
    code, out, err = command("evaluate", run, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize("flags", [["--val-fraction", 0.5], ["--seed", 4], ["--train-split", "train"]])
def test_a_part_of_what_has_a_validation_split_is_refused(flags, photos, command):
    make(photos, "train/{cat,dog}/{1..8}.jpg val/{cat,dog}/{1..4}.jpg")
    train()
    shutil.copytree("photos", "copy")
    for data in ([], ["--data-dir", "copy"]):
        code, _, err = command("evaluate", "run", *flags, *data)
        assert (code, err.count("\n")) == (2, 1)
        assert re.search("a validation split, val, so .* has no effect; give --val-split val alone", err)


def test_a_validation_split_that_came_later(run, command):
    make(Path("photos"), "train/{cat,dog}/{1..8}.jpg val/{cat,dog}/{1..4}.jpg")
    for name in ("cat", "dog"):
        shutil.rmtree(f"photos/{name}")
    code, _, err = command("evaluate", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "the run's --val-fraction 0.2 has no effect; give --val-split val" in err


def test_classes_in_another_order_are_matched_and_it_is_said(run, command, tmp_path):
    rows = load_images("photos", val_fraction=0.2, seed=3).val
    names = ["dog", "cat"]
    labels = [1 - label for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", labels).cast_column("label", ClassLabel(names=names))
    Path("table").mkdir()
    rows.to_parquet("table/test.parquet")
    code, out, _ = command("evaluate", run, "--data-dir", "table")
    assert code == 0
    assert "the classes are not in the network's order: they are matched by name" in out
    assert top1(out) == recorded()


def test_a_baseline_that_was_trained_on_the_images(run, command):
    make(Path("others"), "train/{cat,dog}/{1..8}.jpg val/{cat,dog}/{1..4}.jpg")
    train("--data-dir", Path("others").resolve(), "--method", "plain", "--output", Path("plain").resolve())
    _, out, _ = command(
        "tradeoff", run, "--baseline", "plain", "--data-dir", "others", "--val-split", "train", "--output", "out"
    )
    assert out.splitlines()[1].startswith("warning: plain/best was trained on all of these images")


@pytest.fixture
def renamed(run):
    """The images of the run, as many as before, under names in another order."""
    for path in sorted(Path("photos").glob("*/*.jpg")):
        path.rename(path.with_name(f"{100 - int(path.stem)}.jpg"))


def test_renamed_images_are_not_drawn_from_again(run, renamed, command):
    code, _, err = command("evaluate", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "photos have changed since run/best was trained" in err
    refused = train("--resume", "--epochs", 2, "--seed", 3, "--val-fraction", 0.2, check=False)
    assert refused.returncode == 2
    assert "names, labels or number of the images have changed since the run started" in refused.stderr
    shutil.copytree("run/best", "elsewhere/model")
    first = command("evaluate", "elsewhere/model", "--data", "photos")[1].splitlines()[0]
    assert "may have been trained on these images" in first


@pytest.mark.slow
def test_weights_that_were_trained_on_what_is_measured(run, command):
    """Of a run that goes on with another draw, its first and every later measurement says so."""
    make(Path("others"), "test/{cat,dog}/{1..2}.jpg")
    more = ("--seed", 4, "--val-fraction", 0.2, "--output", Path("tuned").resolve())
    said = re.compile(
        "^warning: .*run/best was trained on about 80% of these images, drawn with .*--seed 4; the run"
        " was validated on the 0.2 of train, drawn with seed 3$",
        re.MULTILINE,
    )
    for begin in (
        ("--model", f"local-dir:{run.resolve()}/best", "--pretrained"),
        ("--initial-checkpoint", run.resolve()),
    ):
        shutil.rmtree("tuned", ignore_errors=True)
        assert said.search(train(*begin, *more).stdout)
        assert said.match(command("evaluate", "tuned")[1])
        assert not said.search(command("evaluate", "tuned", "--data-dir", "others")[1])  # none of these
    shutil.rmtree("tuned")
    same = train(
        "--model",
        f"local-dir:{run.resolve()}/best",
        "--pretrained",
        "--seed",
        3,
        "--val-fraction",
        0.2,
        "--output",
        Path("tuned").resolve(),
    )
    assert "was trained on" not in same.stdout


def test_every_command_has_the_runs_images(run, command):
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data_dir"].endswith("photos")
    for name in ("gradients", "separability", "agreement", "flat-minima"):
        more = ["--draws", 1, "--levels", 0.1] if name == "flat-minima" else []
        code, out, err = command(name, run, "--output", "out", *more)
        assert (code, err) == (0, ""), name
        assert out.startswith("0.2 of train: 8 images"), name
    assert command("tradeoff", run, "--output", "out")[1].startswith("0.2 of train: 8 images")
    assert "300 images, got 8" in command("calibrate", run, "--max-macs", 1e6)[2]


def test_a_run_without_labels(photos, command):
    make(photos, "{cat,dog}/{1..20}.jpg")
    make(Path("labelled"), "{cat,dog}/{1..3}.jpg")
    train("--method", "plain")
    frozen = (
        "--model",
        f"local-dir:{Path('run/best').resolve()}",
        "--pretrained",
        "--freeze-backbone",
        "--unlabelled",
        "--no-aug",
        "--output",
        Path("exits").resolve(),
    )
    train(*frozen)
    code, out, err = command("evaluate", "exits")
    assert (code, err) == (0, "")
    assert top1(out) == recorded("exits/best")  # the folders tell the labels of what is measured
    assert command("evaluate", "exits", "--data", "labelled")[0] == 0
