"""Folders as users have them: what is on the disk is what is trained on, as timm reads it."""

import os
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from timm_selfdistill import load_images
from timm_selfdistill.training.data.finding import load_split

from ...conftest import run_python
from ...programs import ROOT

TABLE = re.search(r"\| files \| what the run says \|\n\|-.*\n((?:\|.*\n)+)", (ROOT / "docs/training.md").read_text())[1]
LAYOUTS = [re.fullmatch(r"\| `(.*)` \| (.*) \|", row).groups() for row in TABLE.splitlines()]


def make(root: Path, files: str) -> None:
    """Files, in the braces of bash; "a->b" is a link to b, "a/" an empty folder."""
    for number, name in enumerate(expand(files)):
        link, arrow, target = name.partition("->")
        path = root / link
        path.parent.mkdir(parents=True, exist_ok=True)
        if arrow:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            Image.fromarray(np.full((8, 8, 3), number % 256, np.uint8)).save(path, format="PNG")


def expand(files: str) -> list[str]:
    words = files.replace("->", "@")  # which bash would take for where to write
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True)
    return [word.replace("@", "->") for word in done.stdout.splitlines() if word]


def rows(files) -> dict[str, str]:
    """Class of each image."""
    return {path: files.class_names[label] for path, label in zip(files.paths, files.labels)}


def timm_rows(root: Path) -> dict[str, str]:
    reader = create_dataset("", root=str(root), search_split=False).reader
    names = {index: name for name, index in reader.class_to_idx.items()}
    return {path: names[label] for path, label in reader.samples}


@pytest.mark.parametrize(("files", "said"), LAYOUTS)
def test_each_row_of_the_page(files, said, photos):
    make(photos, files)
    said = said.split("<br>")
    if said[0].startswith("error: "):
        with pytest.raises(ValueError, match=re.escape(said[0].removeprefix("error: "))):
            load_images("photos")
        return
    images = load_images("photos")
    assert sorted(images.lines()) == sorted(said)
    found = rows(images.train_rows) | rows(images.val_rows)
    assert len(found) == len(images.train_rows) + len(images.val_rows)  # none is on both sides
    splits = [split["from"] for split in images.found]
    left_out = {"photos/cover.jpg"}
    expected = {path: name for split in splits for path, name in timm_rows(split).items() if path not in left_out}
    assert found == expected
    names = create_dataset("", root=splits[0], search_split=False).reader.class_to_idx
    assert images.class_names == [name for name in names if name]


@pytest.mark.parametrize(
    "name", ["photos [2024]", "a*b", "50%", "what?", "{x}", "name\nin two lines", "Bäume ~", "#1", " "]
)
def test_any_character_in_a_path(name, photos):
    make(photos / name / "train", "{cat,dog}/{1..3}.jpg")
    make(photos / name / "val", "{cat,dog}/4.jpg")
    images = load_images(photos / name)
    assert (len(images.train_rows), len(images.val_rows)) == (6, 2)
    train, _ = images.transformed(
        {"input_size": (3, 8, 8), "mean": (0,) * 3, "std": (1,) * 3, "interpolation": "bilinear", "crop_pct": 1.0},
        no_aug=True,
    )
    assert train[0][0].shape == (3, 8, 8)


WORDS = ["1", "2", "10", "007", "Å", "ä", "Zoo", "zebra", "cat", "CAT", "x_y", "(a)", "ß", "é", "٣", "train", "b.c"]


@pytest.mark.parametrize(
    "names",
    [
        ["2", "10", "1"],
        ["b", "A", "C"],
        ["img10", "img9", "IMG8"],
        ["Zebra", "Äffchen", "zoo", "Zoo 2"],
        ["a b", "a", "a_b", "a-b", "aB"],
        ["3²", "x", "²"],
        ["٣", "1", "002"],
        ["train", "Test", "bus"],
        *(
            [f"{draw.choice(WORDS)}{draw.choice(['', ' ', '-'])}{draw.choice(WORDS)}" for _ in range(12)]
            for draw in map(random.Random, range(20))
        ),
    ],
)
def test_images_have_the_classes_and_the_order_of_timm(names, photos):
    names = sorted({name.strip().lower(): name.strip() for name in names}.values())
    for name in names:
        make(photos / name, "{1..3}.jpg {a,B}10.jpg")
    images = load_images(photos, val_fraction=0.3)
    assert sorted(images.class_names) == names
    if not any("²" in name for name in names):  # timm ends with an error there
        reader = create_dataset("", root="photos", search_split=False).reader
        assert images.class_names == list(reader.class_to_idx)
        assert list(zip(images.sampled_rows.paths, images.sampled_rows.labels)) == reader.samples


def test_links_are_followed_and_loops_end(photos, tmp_path):
    make(tmp_path / "store", "a/{cat,dog}/{1..5}.jpg b/{cat,dog}/6.jpg single.jpg")
    (photos / "train").symlink_to(tmp_path / "store/a")
    (photos / "val").symlink_to(tmp_path / "store/b")
    (tmp_path / "store/a/cat/one.jpg").symlink_to(tmp_path / "store/single.jpg")
    (tmp_path / "store/a/cat/up").symlink_to(tmp_path / "store/a")
    (tmp_path / "store/a/dog/self").symlink_to("../dog")
    (tmp_path / "store/a/dog/lost.jpg").symlink_to("nowhere")
    images = load_images(photos)
    assert Counter(rows(images.train_rows).values()) == {"cat": 6, "dog": 5}
    assert images.lines() == [
        "train: 11 images of 2 classes in photos/train; left out: 2 links to a parent folder, 1 broken link",
        "val: 2 images of 2 classes in photos/val",
    ]


@pytest.mark.parametrize("linked", [os.link, os.symlink])
def test_no_image_is_on_both_sides(linked, photos):
    make(photos, "train/{cat,dog}/{1..5}.jpg val/{cat,dog}/6.jpg")
    linked(photos.resolve() / "train/cat/1.jpg", photos / "val/cat/copy.jpg")
    with pytest.warns(
        UserWarning, match="1 of the training images are also validation images, .*not used for training"
    ):
        images = load_images(photos)
    assert (len(images.train_rows), len(images.val_rows)) == (9, 3)
    assert "photos/train/cat/1.jpg" not in images.train_rows.paths

    make(photos / "flat", "{cat,dog}/{1..20}.jpg")
    for index in range(1, 21):
        linked((photos / f"flat/cat/{index}.jpg").resolve(), photos / f"flat/cat/copy{index}.jpg")
    with pytest.warns(UserWarning, match="images are also validation images"):
        images = load_images(photos / "flat", val_fraction=0.5)
    files = [
        {os.path.realpath(path) if linked is os.symlink else os.stat(path).st_ino for path in part.paths}
        for part in (images.train_rows, images.val_rows)
    ]
    assert not files[0] & files[1]


def test_what_is_no_file_is_never_opened(photos):
    make(photos, "{cat,dog}/{1..20}.jpg")
    os.mkfifo(photos / "cat/pipe.jpg")
    os.mkfifo(photos / "pipe.json")
    assert load_images(photos).lines()[0].endswith("; left out: 2 neither file nor folder")


def test_other_extensions_are_named_as_in_timm(photos):
    make(photos, "{cat,dog}/{1..20}.webp {cat,dog}/{1..10}.JPG")
    assert len(load_images(photos).train_rows) == 18
    images = load_images(photos, image_column=".webp;.jpg")
    assert len(images.train_rows) + len(images.val_rows) == 60
    assert len(create_dataset("", root="photos", input_key=".webp;.jpg")) == 60
    for path in photos.glob("*/*.JPG"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no images \(\.jpeg \.jpg \.png\); it holds 40 \.webp; .*--input-key"):
        load_images(photos)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ("", FileNotFoundError, "photos contains no images .*expected one folder of images per class"),
        ("notes.txt a/b/", FileNotFoundError, r"no images .*; it holds 1 \.txt"),
        ("cat/{1..5}.jpg", ValueError, r"only one class \(\['cat'\]\); at least 2 are needed"),
        ("train/cat/{1..5}.jpg val/cat/1.jpg", ValueError, "photos/train have only one class"),
        ("cat/1.jpg dog/{1..9}.jpg", ValueError, "class 'cat' has only one image, .*validation split"),
        (
            "train/{cat,dog}/{1..5}.jpg val/{cat,fish}/6.jpg",
            ValueError,
            "photos/val .*'fish', .*2 classes .*'cat', 'dog'",
        ),
        ("train/{Cat,dog}/{1..5}.jpg val/{cat,dog}/6.jpg", ValueError, "'cat', .*differs from 'Cat' only in case"),
        ("train/{cat,dog}/{1..5}.jpg {val,valid}/{cat,dog}/6.jpg", ValueError, "both val/ and valid/ .*val_split"),
        ("{train,training}/{cat,dog}/{1..5}.jpg", ValueError, "both train/ and training/ .*train_split"),
        ("train/{1..5}.jpg val/{1..5}.jpg", ValueError, "photos/train holds 5 images, but no class folders"),
        ("val/{cat,dog}/{1..5}.jpg", ValueError, "no split 'train'; it has 'val'"),
        ("a/b/train/{cat,dog}/{1..5}.jpg a/b/test/{cat,dog}/6.jpg", ValueError, "photos/a/b holds the splits"),
        (
            "cat/{train,val}/{1..5}.jpg dog/{1..5}.jpg",
            ValueError,
            "photos/cat holds train/ and val/, which would be read as classes",
        ),
        ("test/{cat,dog}/{1..5}.jpg bus/{1..5}.jpg", ValueError, "photos is ambiguous"),
    ],
)
def test_what_cannot_be_read(files, error, message, photos):
    make(photos, files)
    with pytest.raises(error, match=message):
        load_images(photos)


@pytest.fixture
def open_place():
    """A folder that every user may read; pytest's may be read by one only."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_that_may_not_be_read(link, open_place):
    make(open_place / "photos", "{cat,dog}/{1..5}.jpg")
    secret = open_place / ("elsewhere" if link else "photos/secret")
    make(secret, "deep/{1..5}.jpg")
    if link:
        (open_place / "photos/secret").symlink_to(secret / "deep")
    secret.chmod(0)
    script = open_place / "script.py"
    script.write_text(
        "import os, sys\nfrom timm_selfdistill.training.data.finding import load_images\n"
        "if os.getuid() == 0: os.setuid(65534)  # who may read everything\n"
        "try: load_images(sys.argv[1])\nexcept PermissionError as error: print(error)\n"
    )
    done = run_python(script, open_place / "photos")
    assert done.stdout == f"{open_place}/photos/secret is not readable; change its permissions, or move it away\n"


def test_named_splits(photos):
    make(photos, "first/{cat,dog}/{1..5}.jpg second/{cat,dog}/6.jpg third/{cat,dog}/{7..9}.jpg")
    images = load_images(photos, train_split="first", val_split="third")
    assert images.lines() == [
        "first: 10 images of 2 classes in photos/first; left out: 2 images in second/",
        "third: 6 images of 2 classes in photos/third",
    ]
    with pytest.raises(ValueError, match="'first' is also the training split; .*val_fraction"):
        load_images(photos, train_split="first", val_split="first")


def test_the_name_given_decides(photos):
    make(photos, "{train,training,val,valid}/{cat,dog}/{1..5}.jpg")
    assert load_images(photos, train_split="training", val_split="valid").lines()[0].startswith("training: 10 images")


def test_another_name_of_a_split(photos):
    make(photos, "training/{cat,dog}/{1..5}.jpg valid/{cat,dog}/6.jpg test/{cat,dog}/{7..9}.jpg")
    assert len(load_images(photos, val_split="validation").val_rows) == 2
    assert len(load_images(photos, val_split="test").val_rows) == 6
    with pytest.raises(ValueError, match="no split 'dev'; it has 'test', 'training', 'valid'"):
        load_images(photos, val_split="dev")


def test_more_classes_than_folders(photos):
    make(photos, "{cat,dog}/{1..20}.jpg")
    assert load_images(photos, num_classes=4).class_names == ["cat", "dog", "2", "3"]
    with pytest.raises(ValueError, match="num_classes is 1, .*2 classes"):
        load_images(photos, num_classes=1)


def test_a_folder_as_a_table(photos):
    make(photos, "train/{cat,dog}/{1..5}.jpg val/{cat,dog}/6.jpg")
    images = load_images(photos)
    assert images.train.features["label"].names == ["cat", "dog"]
    assert images.train[0]["image"].size == (8, 8)
    assert images.val["label"][:] == [0, 1]


def test_a_folder_is_not_streamed(photos):
    make(photos, "{cat,dog}/{1..20}.jpg")
    with pytest.raises(ValueError, match="photos is a folder of image files, .*leave out streaming"):
        load_images(photos, streaming=True)


@pytest.mark.parametrize("alias", ["train", "Train", "training"])
def test_no_name_of_the_training_split_is_a_validation_split(alias, photos):
    make(photos, "train/{cat,dog}/{1..5}.jpg")
    with pytest.raises(ValueError, match="is also the training split; .*val_fraction"):
        load_images(photos, val_split=alias)
    rows = load_images(photos).train
    with pytest.raises(ValueError, match="is also the training split; .*val_fraction"):
        load_images({"training": rows, "test": rows}, val_split=alias)


def test_what_is_not_divided_has_one_name(photos):
    make(photos, "{cat,dog}/{1..20}.jpg")
    assert len(load_split(photos, "train").val_rows) == 40
    for name in ("val", "cat", "trian"):
        with pytest.raises(ValueError, match=f"photos has no split '{name}'; it has only 'train'"):
            load_split(photos, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "webp"}, "image_column .*extensions, such as '.webp;.png', got 'webp'"),
        ({"image_column": "image"}, "got 'image'"),
        ({"label_column": "kind"}, "classes are its folders; .*'kind'"),
    ],
)
def test_a_folder_has_no_columns(settings, message, photos):
    make(photos, "{cat,dog}/{1..20}.jpg cat/{1..20}.webp")
    with pytest.raises(ValueError, match=message):
        load_images(photos, **settings)
    assert len(load_images(photos, image_column=" .WEBP; .jpg;").sampled_rows) == 60


@pytest.mark.parametrize("name", ["ca\nt", os.fsdecode(b"caf\xe9"), "a\x1b[2Jb"])
def test_class_names_that_cannot_be_printed_are_refused_before_training(name, photos):
    make(photos, "dog/{1..20}.jpg")
    make(photos / name, "{1..20}.jpg")
    with pytest.raises(ValueError, match="with unprintable characters; rename"):
        load_images(photos)


def test_a_path_that_is_no_utf_8(photos):
    make(photos / os.fsdecode(b"caf\xe9"), "{cat,dog}/{1..20}.jpg")
    with pytest.raises(ValueError, match="is not valid UTF-8 .*rename"):
        load_images(photos / os.fsdecode(b"caf\xe9"))


def test_links_to_themselves_and_into_folders_that_may_not_be_entered(photos):
    make(photos, "{cat,dog}/{1..20}.jpg")
    (photos / "cat/a.jpg").symlink_to("b")
    (photos / "cat/b").symlink_to("a.jpg")
    assert load_images(photos).lines()[0].endswith("; left out: 2 broken links")


@pytest.mark.parametrize("files", ["dog->../train/dog cat/{6,7}.jpg", "dog/1.jpg->../../train/dog/1.jpg cat/6.jpg"])
def test_a_class_that_is_on_the_other_side_whole(files, photos):
    make(photos, "train/cat/{1..5}.jpg train/dog/1.jpg")
    make(photos / "val", files)
    with pytest.raises(ValueError, match="all training images of class 'dog' are also validation images"):
        load_images(photos)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("cat/{1..20}.jpg all.tar", r"only one class \(\['cat'\]\)"),
        ("{1..20}.jpg all.tar", "no class folders"),
        ("{1..20}.jpg embeddings.parquet", "no class folders"),
        ("{train,val}/{1..5}.jpg", "if train/ itself is a class, rename it"),
        (
            "data/train/{cat,dog}/{1..5}.jpg data/val/{1..5}.jpg",
            "photos/data holds the splits train/ and val/: give that",
        ),
    ],
)
def test_the_cause_is_named(files, said, photos):
    make(photos, files)
    with pytest.raises(ValueError, match=said):
        load_images(photos)


@pytest.mark.parametrize(
    "name",
    [
        "state.json",
        "dataset_dict.json",
        "dataset_info.json",
        "test-set-notes.parquet",
        "cat/train.arrow",
        "cat/train.parquet",
    ],
)
def test_sidecars_with_the_names_of_others_change_nothing(name, photos):
    make(photos, "{cat,dog}/{1..20}.jpg")
    (photos / name).write_text("{}")
    assert len(load_images(photos).sampled_rows) == 40


def test_metadata_of_images_that_are_left_out_changes_nothing(photos):
    make(photos, "train/{cat,dog}/{1..20}.jpg test/{1..3}.jpg")
    (photos / "test/metadata.csv").write_text("file_name,kind\n1.jpg,a\n")
    assert len(load_images(photos).sampled_rows) == 40


def test_one_metadata_file_for_several_splits(photos):
    make(photos, "train/images/{1..4}.jpg val/images/{5,6}.jpg")
    names = [f"{split}/images/{index}.jpg" for split, some in (("train", "1234"), ("val", "56")) for index in some]
    (photos / "metadata.csv").write_text("file_name,kind\n" + "".join(f"{name},a\n" for name in names))
    with pytest.raises(ValueError, match="splits train/ and val/, but a single metadata file for all .*each folder"):
        load_images(photos, label_column="kind")


@pytest.mark.parametrize(
    "names",
    [
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("train_set", "val_set"),
        ("images_train", "images_val"),
        ("Train-1", "Test-1"),
    ],
)
def test_folders_that_are_likely_to_be_splits(names, photos):
    for name in names:
        make(photos / name, "{cat,dog}/{1..10}.jpg")
    make(photos, "seg_pred/{1..5}.jpg")
    message = f"{names[0]}/ and {names[1]}/ hold the same classes, such as 'cat', .*--val-split {names[1]}"
    with pytest.raises(ValueError, match=message):
        load_images(photos)
    images = load_images(photos, train_split=names[0], val_split=names[1])
    assert (len(images.train_rows), len(images.val_rows)) == (20, 20)


def test_runs_in_the_folder_are_no_images(photos):
    make(photos, "{cat,dog}/{1..20}.jpg output/run/{curves,exits}.png output/run/best/exits.png saved/exits.png")
    (photos / "output/run/config.yaml").touch()
    (photos / "output/run/last").mkdir()
    (photos / "saved/config.json").touch()
    (photos / "saved/model.safetensors").touch()
    images = load_images(photos)
    assert images.class_names == ["cat", "dog"]
    assert images.lines()[0].endswith(
        "; left out: 2 folders of training runs or saved models, 1 folder without an image"
    )


def test_letters_that_are_written_in_two_ways(photos):
    make(photos, "train/{caf\u00e9,dog}/{1..5}.jpg val/{cafe\u0301,dog}/6.jpg")
    with pytest.raises(
        ValueError, match=r"class 'cafe\\u0301', .*differs from 'caf\\xe9' only in case or Unicode form"
    ):
        load_images(photos)


def test_a_split_of_which_only_the_other_kind_is_there(photos):
    make(photos, "test/{cat,dog}/{1..20}.jpg")
    assert len(load_images(photos, train_split="test").train_rows) == 36
    with pytest.raises(ValueError, match="no split 'train'; it has 'test'"):
        load_images(photos)


def test_a_part_that_would_take_a_whole_class(photos):
    make(photos, "{a..l}/{1,2}.jpg")
    with pytest.raises(ValueError, match="too small for 12 classes and would take all images of class '[a-l]'"):
        [load_images(photos, seed=seed) for seed in range(20)]


def test_too_few_images_to_divide(photos):
    make(photos, "{cat,dog}/{1,2}.jpg")
    with pytest.raises(ValueError, match=r"val_fraction 0\.9 of 4 images leaves none for training"):
        load_images(photos, val_fraction=0.9)


def test_the_part_for_validation_is_that_of_datasets(photos):
    make(photos, "{cat,dog,fish}/{1..21}.jpg")
    images = load_images(photos, val_fraction=0.3, seed=7)
    parts = images.sampled_rows.table.train_test_split(0.3, seed=7, stratify_by_column="label")
    paths = parts["test"].cast_column("image", datasets.Image(decode=False))["image"][:]
    assert [row["path"] for row in paths] == images.val_rows.paths
