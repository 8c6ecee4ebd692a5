import re

import datasets
import numpy as np
import pytest
import timm
from PIL import Image

from timm_selfdistill import load_images, model_data_config
from timm_selfdistill.training.data.finding import load_split

from ...conftest import EMBEDDED, small_backbone

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
AB = datasets.ClassLabel(names=["a", "b"])


def picture(mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 10 images each."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(10):
            picture().save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


def table(labels: list, column: str = "label") -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"image": [picture()] * len(labels), column: labels})
    return rows.cast_column("image", datasets.Image())


def test_the_embedded_images():
    images = load_images(EMBEDDED)
    assert (len(images.train), len(images.val)) == (6000, 1000)
    assert images.class_names == CLASSES
    assert (images.in_chans, images.sample.grey, images.size) == (3, True, (28, 28))
    assert np.bincount(images.train["label"][:]).tolist() == [600] * 10
    assert np.bincount(images.val["label"][:]).tolist() == [100] * 10
    assert sum(path.stat().st_size for path in EMBEDDED.glob("*.parquet")) <= 4_000_000


def test_a_folder_of_images(folder):
    images = load_images(folder, val_fraction=0.2)
    assert images.class_names == ["cat", "dog"]
    assert (images.in_chans, images.sample.grey, images.size) == (3, False, (20, 30))
    assert np.bincount(images.train["label"][:]).tolist() == [8, 8]
    assert np.bincount(images.val["label"][:]).tolist() == [2, 2]


@pytest.mark.parametrize("val_split", ["validation", "val", "valid", "test"])
def test_a_folder_with_splits(folder, val_split):
    for split in ("train", val_split):
        (folder / split).mkdir()
        for name in ("cat", "dog"):
            (folder / split / name).mkdir()
            picture().save(folder / split / name / "one.png")
    for name in ("cat", "dog"):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    images = load_images(folder)
    assert (len(images.train), len(images.val)) == (2, 2)


@pytest.mark.parametrize("form", ["parquet", "arrow", "disk", "dict", "object"])
def test_other_forms(form, tmp_path):
    rows = table(["x", "y"] * 10)
    if form == "parquet":
        rows.to_parquet(source := tmp_path / "images.parquet")
    elif form == "arrow":
        rows.save_to_disk(tmp_path / "saved")
        (source := tmp_path / "images.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    elif form == "disk":
        rows.save_to_disk(source := tmp_path / "saved")
    else:
        source = datasets.DatasetDict(train=rows, test=rows) if form == "dict" else rows
    images = load_images(source, label_column="label")
    assert images.class_names == ["x", "y"]
    assert (len(images.train), len(images.val)) == ((20, 20) if form == "dict" else (18, 2))


def test_integer_labels_without_names_are_named_by_their_number():
    images = load_images(table([0, 1, 2] * 2, "fine"), label_column="fine")
    assert images.class_names == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("mode", "in_chans", "expected"),
    [
        ("L", None, (3, 32, 32)),
        ("L", 1, (1, 32, 32)),
        ("RGB", None, (3, 32, 32)),
        ("L", 3, (3, 32, 32)),
        ("RGBA", 1, (1, 32, 32)),
        ("P", 3, (3, 32, 32)),
        ("I;16", 1, (1, 32, 32)),
    ],
)
def test_grey_palette_and_transparent_images_of_any_size(mode, in_chans, expected):
    picture_in_mode = Image.fromarray(np.full((20, 30), 700, dtype=np.uint16)) if mode == "I;16" else picture(mode)
    rows = datasets.Dataset.from_dict({"image": [picture_in_mode] * 4, "label": [0, 1] * 2})
    images = load_images(rows.cast_column("image", datasets.Image()), label_column="label", val_fraction=0.5)
    channels = in_chans or images.in_chans
    config = model_data_config(small_backbone(in_chans=channels), 32, channels)
    for data in images.transformed(config):
        assert data[0][0].shape == expected
        assert data[0][0].isfinite().all()


def test_16_bit_images_keep_their_greys():
    steps = Image.fromarray(np.repeat(np.array([[0, 64, 128, 255]], dtype=np.uint16) * 257, 4, axis=0))
    rows = datasets.Dataset.from_dict({"image": [steps] * 4, "label": ["a", "b"] * 2})
    images = load_images(rows.cast_column("image", datasets.Image()), label_column="label", val_fraction=0.5)
    config = model_data_config(
        small_backbone(in_chans=1), 4, 1, mean=[0.0], std=[1.0], crop_pct=1.0, interpolation="nearest"
    )
    _, val = images.transformed(config)
    assert (val[0][0][0, 0] * 255).round().tolist() == [0, 64, 128, 255]


def test_augmentation_changes_training_images_alone(fashion):
    config = model_data_config(small_backbone(in_chans=1), 32, 1)
    train, val = fashion.transformed(config, auto_augment="rand-m9", re_prob=1.0)
    assert not (train[0][0] == train[0][0]).all()
    assert (val[0][0] == val[0][0]).all()


def test_preprocessing_is_written_back_to_the_model():
    backbone = small_backbone(in_chans=1)
    config = model_data_config(backbone, 48, 1, class_names=CLASSES, mean=[0.4], crop_pct=0.8)
    resolved = timm.data.resolve_model_data_config(backbone)
    assert resolved["input_size"] == config["input_size"] == (1, 48, 48)
    assert list(resolved["mean"]) == list(config["mean"]) == [0.4]
    assert resolved["crop_pct"] == config["crop_pct"] == 0.8
    assert backbone.pretrained_cfg["label_names"] == CLASSES


def test_a_model_of_one_image_size_is_moved_to_another():
    backbone = timm.create_model("test_vit", num_classes=10)
    model_data_config(backbone, 64)
    assert backbone.patch_embed.img_size == (64, 64)


def test_small_images_are_trained_at_a_fitting_size(fashion):
    assert fashion.fitting_size(small_backbone("resnet10t")) == 32
    assert fashion.fitting_size(small_backbone("test_vit")) == 32
    smaller = small_backbone()
    smaller.pretrained_cfg["input_size"] = (3, 24, 24)
    assert fashion.fitting_size(smaller) == 24
    assert fashion.fitting_size(timm.create_model("coat_tiny")) == 224  # which takes nothing else


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 0}, r"img_size .*1 pixel, got 0"),
        ({"crop_pct": 0}, r"crop_pct .*\(0, 1\], got 0"),
        ({"mean": [0.1, 0.2]}, r"mean .*1 or 3 values, .*got 2: \(0\.1, 0\.2\)"),
    ],
)
def test_bad_preprocessing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_data_config(small_backbone(), **arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"auto_augment": "foo"}, r"timm .*transforms: .*policy foo"),
        ({"interpolation": "foo"}, r"timm .*transforms: 'foo'"),
    ],
)
def test_unknown_augmentation_is_refused(fashion, setting, message):
    with pytest.raises(ValueError, match=message):
        fashion.transformed(model_data_config(small_backbone(in_chans=1), 32, 1), **setting)


def test_other_numbers_of_channels_are_refused(fashion):
    with pytest.raises(ValueError, match=r"1 or 3 channels.*in_chans=7"):
        fashion.transformed(model_data_config(small_backbone(in_chans=7), 32, 7))


def test_a_folder_with_no_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} .*one folder of images per class.*parquet"):
        load_images(tmp_path)


def test_a_folder_with_one_class(folder):
    for path in (folder / "dog").iterdir():
        path.unlink()
    (folder / "dog").rmdir()
    with pytest.raises(ValueError, match=r"only one class \(\['cat'\]\); at least 2 are needed"):
        load_images(folder)


def test_an_unreadable_image_is_named(folder):
    (folder / "dog" / "3.png").write_bytes(b"not an image")
    images = load_images(folder, val_fraction=0.1)
    train, _ = images.transformed(model_data_config(small_backbone(), 32))
    with pytest.raises(ValueError, match=re.escape(f"image {folder / 'dog' / '3.png'}:")):
        [train[index] for index in range(len(train))]


def test_a_truncated_image_is_named(folder):
    path = folder / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    images = load_images(folder, val_fraction=0.1)
    train, val = images.transformed(model_data_config(small_backbone(), 32))
    with pytest.raises(ValueError, match=re.escape(f"image {path}:")):
        [data[index] for data in (train, val) for index in range(len(data))]


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "images.txt").write_text("x")
    with pytest.raises(ValueError, match=r"images\.txt .*\.parquet .*\.arrow "):
        load_images(tmp_path / "images.txt")


def test_a_source_of_another_type():
    with pytest.raises(TypeError, match="got int"):
        load_images(3)


@pytest.mark.parametrize(
    ("labels", "arguments", "error", "message"),
    [
        (["x"] * 4, {"label_column": "label"}, ValueError, r"only one class \(\['x'\]\); at least 2 "),
        ([3] * 4, {"label_column": "label"}, ValueError, r"only one class \(\['3'\]\); at least 2 "),
        ([[0], [1]], {"label_column": "label"}, TypeError, r"'label' .*one class index .*List\("),
        ([0, -1, 1, 0], {"label_column": "label"}, ValueError, r"'label' .*0\.\.1, got -1; .*split without labels"),
        ([0.5, 1.0, 0.0, 1.0], {"label_column": "label"}, TypeError, r"'label' .*indices or names, got .*float64"),
        (["x", "y"] * 2, {}, ValueError, r"\(ClassLabel\) .*image, label; .*label_column \(--target-key\)"),
        (["x", "y"] * 2, {"label_column": "class"}, ValueError, r"column 'class'; .*image, label"),
        (["x", "y"] * 2, {"image_column": "picture"}, ValueError, r"column 'picture'; .*image, label"),
        (
            ["x", "y"] * 2,
            {"train_split": "training", "val_split": "eval", "label_column": "label"},
            ValueError,
            r"split 'eval'; .*'training'",
        ),
        (
            ["x", "y"] * 2,
            {"label_column": "label", "val_fraction": 1.0},
            ValueError,
            r"val_fraction .*0 and 1, got 1\.0",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(labels, arguments, error, message):
    with pytest.raises(error, match=message):
        load_images(table(labels), **arguments)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1, 2, 3] * 4, "label 0, since labels start at 1: 4 classes, 3 of them"),
        ([0, 2, 5] * 4, "label 1, 3, 4: 6 classes"),
        ([0, 1, 2] * 4, None),
    ],
)
def test_labels_with_gaps_are_said(labels, said, recwarn):
    assert load_images(table(labels), label_column="label").num_classes == max(labels) + 1
    messages = [str(warning.message) for warning in recwarn if "no training image" in str(warning.message)]
    assert len(messages) == bool(said)
    assert not said or said in messages[0]


def test_a_split_to_measure_on_may_lack_classes(tmp_path, recwarn):
    rows = table([0, 0, 2]).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    rows.to_parquet(tmp_path / "test.parquet")
    images = load_split(tmp_path, "test")
    assert (len(images.val), images.class_names) == (3, ["a", "b", "c"])
    assert not [warning for warning in recwarn if "label" in str(warning.message)]


def test_classes_without_images_are_said(recwarn):
    rows = table([0, 2] * 10).cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    assert load_images(rows).class_names == ["a", "b", "c"]
    assert any("label 1 (b): 3 classes, 2 of them" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("secret", [-1, None])
def test_a_split_whose_labels_are_secret_is_no_validation_split(secret, tmp_path):
    rows = table([0, 1] * 10).cast_column("label", AB)
    hidden = table([secret] * 4).cast_column("label", AB)
    splits = datasets.DatasetDict(train=rows, test=hidden)
    splits.save_to_disk(tmp_path / "saved")
    for source in (splits, tmp_path / "saved"):
        with pytest.warns(UserWarning, match="'test' has labels that are all -1 or missing .*val_fraction"):
            images = load_images(source)
        assert (len(images.train), len(images.val)) == (18, 2)
        with pytest.raises(ValueError, match="no label|-1"):
            load_images(source, val_split="test")
        with pytest.raises(ValueError, match="'train' is also the training split; .*val_fraction"):
            load_images(source, val_split="train")
    with pytest.warns(UserWarning, match="'validation' has labels that are all -1"):
        assert len(load_images({"train": rows, "validation": hidden, "test": rows.select(range(6))}).val) == 6


def test_a_split_that_cannot_be_measured_on_is_passed_over():
    rows = table([0, 1] * 10).cast_column("label", AB)
    for other, said in ((rows.remove_columns("label"), "has no column 'label'"), (rows.select([]), "is empty")):
        with pytest.warns(UserWarning, match=f"split 'test' {said}"):
            assert len(load_images({"train": rows, "test": other}).val) == 2
    lists = table([[0], [1]])
    with pytest.raises(TypeError, match=r"'label' .*one class index .*List\("):
        load_images({"train": lists, "test": lists}, label_column="label")


def test_labels_that_begin_at_1_and_do_not_fit():
    with pytest.raises(ValueError, match=r"0\.\.2, got 3; they start at 1, but must start at 0"):
        load_images(table([1, 2, 3] * 3), label_column="label", num_classes=3)


def test_a_class_with_one_image_cannot_be_divided():
    rows = table(["a"] * 9 + ["b"])
    with pytest.raises(ValueError, match="class 'b' has only one image, .*validation split"):
        load_images(rows, label_column="label")
    assert len(load_images({"train": rows, "test": rows}, label_column="label").val) == 10


def test_a_folder_with_a_metadata_file(tmp_path):
    for index in range(20):
        picture().save(tmp_path / f"red train {index}.png")
    picture().save(tmp_path / "unknown.png")
    lines = [f"red train {index}.png,{'ab'[index % 2]}" for index in range(20)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,kind", *lines]))
    images = load_images(tmp_path, label_column="kind")
    assert (len(images.train), len(images.val), images.class_names) == (18, 2, ["a", "b"])
    assert images.lines()[0].endswith("; left out: 1 image not listed in metadata files")
    with pytest.raises(ValueError, match=r"\(ClassLabel\) among image, kind; .*label_column \(--target-key\)"):
        load_images(tmp_path)
    (tmp_path / "red train 3.png").unlink()
    with pytest.raises(FileNotFoundError, match="list 1 images that do not exist, such as .*red train 3.png"):
        load_images(tmp_path, label_column="kind")


def test_class_folders_beside_a_metadata_file_can_be_read_in_two_ways(folder):
    (folder / "metadata.csv").write_text("file_name,kind\ncat/1.png,a\ndog/1.png,b\ndog/2.png,b\ncat/2.png,a\n")
    with pytest.raises(ValueError, match="its folders or a column of .*metadata.csv; .*rename .*--target-key"):
        load_images(folder)
    assert load_images(folder, label_column="kind", val_fraction=0.5).class_names == ["a", "b"]
    (folder / "metadata.csv").write_text("name,kind\ncat/1.png,a\n")  # says nothing of files
    assert load_images(folder).lines()[0].endswith("; left out: 1 .csv")


def test_parquet_beside_class_folders(folder):
    table([0, 1]).to_parquet(folder / "embeddings.parquet")
    assert load_images(folder).lines()[0].endswith("; left out: 1 .parquet")
    table([0, 1]).to_parquet(folder / "train-00000.parquet")
    with pytest.raises(ValueError, match=r"both 20 images in class folders and .*\.parquet; give a folder"):
        load_images(folder)


def test_a_parquet_folder_with_a_picture_and_any_character_in_its_name(tmp_path):
    folder = tmp_path / "photos [2024]"
    (folder / "assets").mkdir(parents=True)
    picture().save(folder / "assets/cover.png")
    for split in ("train", "test"):
        table([0, 1] * 4).cast_column("label", AB).to_parquet(folder / f"{split}.parquet")
    images = load_images(folder)
    assert (len(images.train), len(images.val)) == (8, 8)
    assert images.lines()[0].endswith("; left out: 1 image beside the tables")


def test_one_picture_decides_nothing(folder):
    for index in range(0, 10, 3):
        picture("L").save(folder / "cat" / f"{index}.png")
    picture(size=(3, 3)).save(folder / "cat/0.png")
    for seed in range(4):
        images = load_images(folder, seed=seed)
        assert (images.in_chans, images.sample.grey, images.size) == (3, False, (20, 30))
    for path in folder.glob("*/*.png"):
        Image.open(path).convert("L").convert("RGB").save(path)
    assert load_images(folder).sample.grey  # also where grey images are saved in colours


def test_labels_out_of_the_classes_range_are_refused():
    rows = table([0, 1, -1, 0]).cast_column("label", AB)
    with pytest.raises(ValueError, match=r"column 'label' .*0\.\.1, got -1"):
        load_images(rows)


def test_missing_labels_are_counted():
    rows = table([0, 1, None, 0]).cast_column("label", AB)
    with pytest.raises(ValueError, match=r"1 of 4 rows .*training split .*no label"):
        load_images(datasets.DatasetDict(train=rows, test=rows))


def test_splits_with_other_classes_are_refused():
    def rows(names):
        return table([0, 1, 0, 1]).cast_column("label", datasets.ClassLabel(names=names))

    with pytest.raises(ValueError, match=r"training and validation .*\['a', 'b'\], \['b', 'a'\]"):
        load_images(datasets.DatasetDict(train=rows(["a", "b"]), test=rows(["b", "a"])))


def test_a_folder_of_images_without_labels(tmp_path):
    for index in range(20):
        picture().save(tmp_path / f"{index}.png")
    images = load_images(tmp_path, unlabelled=True, val_fraction=0.2)
    assert (len(images.train), len(images.val), images.num_classes, images.label_column) == (16, 4, None, None)
    train, val = images.transformed(model_data_config(small_backbone(), 32), no_aug=True)
    assert [label for _, label in train] == [-1] * 16
    assert [label for _, label in val] == [-1] * 4
    assert train[0][0].shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"20 images, .*no class folders; .*--unlabelled"):
        load_images(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_unlabelled_images_are_used_for_validation_only(streaming):
    images = load_images(EMBEDDED, unlabelled=True, streaming=streaming)
    assert images.class_names == CLASSES
    train, val = images.transformed(model_data_config(small_backbone(in_chans=1), 32, in_chans=1), no_aug=True)
    assert (train.label_column, val.label_column) == (None, "label")
    assert next(iter(train))[1] == -1
    assert next(iter(val))[1] >= 0
    assert images.fitting_labels(10) is images
    assert images.fitting_labels(10, CLASSES) is images
    turned = images.fitting_labels(10, CLASSES[::-1])
    _, turned_val = turned.transformed(model_data_config(small_backbone(in_chans=1), 32, in_chans=1), no_aug=True)
    assert [turned.class_names[label] for _, (_, label) in zip(range(9), turned_val)] == [
        CLASSES[label] for _, (_, label) in zip(range(9), val)
    ]
    for others, network in (((1000,), "1000"), ((10, [*CLASSES[:9], "Boot"]), "10: T-shirt/top, ...")):
        said = rf"\(10: T-shirt/top, .*network \({re.escape(network)}\).*agreement with the deepest exit"
        with pytest.warns(UserWarning, match=said):
            without = images.fitting_labels(*others)
        assert (without.label_column, without.num_classes) == (None, None)


def test_labels_of_training_images_that_are_not_used_may_be_missing():
    splits = {"train": table([0, None, 1]), "test": table(["a", "b", "a"])}
    images = load_images(splits, unlabelled=True, label_column="label")
    assert images.class_names == ["a", "b"]
    splits = {"train": table([0, None, 1]).remove_columns("label"), "test": table([0, 1]).cast_column("label", AB)}
    assert load_images(splits, unlabelled=True).class_names == ["a", "b"]
    secret = {"train": table([0, 1]), "test": table([-1, -1]).cast_column("label", AB)}
    assert load_images(secret, unlabelled=True).label_column is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_network_may_have_more_classes_than_the_images(streaming):
    images = load_images(EMBEDDED, num_classes=12, streaming=streaming)
    assert images.class_names == [*CLASSES, "10", "11"]
    if not streaming:
        assert images.train.features["label"].names == images.val.features["label"].names == images.class_names
        assert images.train[:5]["label"] == load_images(EMBEDDED).train[:5]["label"]
    with pytest.raises(ValueError, match=r"num_classes .*9, .*10 classes"):
        load_images(EMBEDDED, num_classes=9, streaming=streaming)
