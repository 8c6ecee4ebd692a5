"""What other programs measure of a saved model is what its card says."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from timm_selfdistill import (
    SelfDistillModel,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    model_data_config,
    wrap_self_distill,
)
from timm_selfdistill.cli.main import main
from timm_selfdistill.inference.export import export_onnx

CLASSES = ("top", "bottom", "left", "right")
PARTS = {"top": np.s_[:20], "bottom": np.s_[20:], "left": np.s_[:, :20], "right": np.s_[:, 20:]}
VAL_IMAGES = 1000


class Run(NamedTuple):
    folder: Path
    """The saved model."""
    images: Path
    """A folder of validation images, a subfolder a class."""
    rows: list[dict[str, Any]]
    """Of summary.json."""

    @property
    def top1(self) -> float:
        return self.rows[-2]["top1"]


def draw_images(root: Path, count: int, mode: str, rng: np.random.Generator) -> None:
    """Noise, brighter in one half: mostly the class, so that no network is always right; wide, so that how an image is
    cropped matters."""
    for index in range(count):
        name = CLASSES[index % len(CLASSES)]
        pixels = rng.integers(0, 140, (40, 56, 3)) + rng.integers(0, 60)
        pixels[PARTS[CLASSES[rng.integers(4)] if rng.random() < 0.2 else name]] += 45
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(root / name / f"{index}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    draw_images(folder / "train", 400, "RGB", rng)
    draw_images(folder / "val", VAL_IMAGES, "RGB", rng)
    return folder


NETWORKS = [("test_vit", 3)]
MORE_NETWORKS = [
    ("test_resnet", 3),
    ("test_convnext", 3),
    ("test_efficientnet", 3),
    ("test_resnet", 1),
    ("test_vit", 1),
]


@pytest.fixture(
    scope="module",
    params=[*NETWORKS, *(pytest.param(network, marks=pytest.mark.slow) for network in MORE_NETWORKS)],
    ids=str,
)
def run(request, images, tmp_path_factory):
    """A short run of a network in whose pretrained_cfg weights have a size and a crop of their own for testing."""
    name, in_chans = request.param
    overlay = {"test_input_size": (3, 96, 96), "test_crop_pct": 0.7, "tag": "some_in1k"}
    backbone = timm.create_model(name, num_classes=len(CLASSES), in_chans=in_chans, pretrained_cfg_overlay=overlay)
    data = load_images(images)
    config = model_data_config(backbone, 32, in_chans, class_names=data.class_names, crop_pct=0.9)
    output = tmp_path_factory.mktemp("run") / "run"
    task = SelfDistillTask(wrap_self_distill(backbone))
    settings = TrainConfig(
        output=str(output),
        epochs=3,
        batch_size=32,
        workers=0,
        opt="adamw",
        lr=5e-3,
        weight_decay=0.0,
        settings={"data_dir": str(images)},
    )
    result = Trainer(task, *data.transformed(config, no_aug=True), settings).fit()
    return Run(output / "best", images / "val", result.summary["exits"])


def image_mode(config: dict[str, Any]) -> str:
    return "L" if config["input_size"][0] == 1 else "RGB"


def percent(right: int) -> float:
    return 100 * right / VAL_IMAGES


def test_the_accuracies_can_tell_readers_apart(run):
    assert 30 < run.top1 < 99, run.rows


@pytest.mark.parametrize("use_test_size", [False, True])
def test_timms_loader(run, use_test_size):
    model = timm.create_model(f"local-dir:{run.folder}", pretrained=True).eval()
    config = resolve_data_config({}, model=model, use_test_size=use_test_size)
    dataset = create_dataset("", root=str(run.images), input_img_mode=image_mode(config))
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=50,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    assert percent(right) == run.top1


def batches(run: Run, model: SelfDistillModel) -> DataLoader:
    config = resolve_data_config(model=model.backbone)
    return DataLoader(
        create_dataset(
            "", root=str(run.images), transform=create_transform(**config), input_img_mode=image_mode(config)
        ),
        50,
    )


def test_every_exit_by_from_pretrained(run):
    model = SelfDistillModel.from_pretrained(run.folder)
    right = [0] * len(run.rows)
    with torch.inference_mode():
        for x, y in batches(run, model):
            for index, row in enumerate(run.rows):
                right[index] += int((model.predict(x, row["exit"]).argmax(1) == y).sum())
    assert [percent(count) for count in right] == [row["top1"] for row in run.rows]


def test_evaluate(run, monkeypatch, capsys):
    for data in ([], ["--data-dir", str(run.images)]):
        monkeypatch.setattr("sys.argv", ["timm-selfdistill", "evaluate", str(run.folder), *data])
        with pytest.raises(SystemExit, match="0"):
            main()
        lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        assert [line[3].strip() for line in lines] == [f"{row['top1']:.2f}" for row in run.rows]


@pytest.mark.slow
def test_onnx(run, tmp_path):
    model = SelfDistillModel.from_pretrained(run.folder)
    images = list(batches(run, model))
    for row in run.rows:
        export_onnx(model, tmp_path / "exit.onnx", row["exit"])
        session = onnxruntime.InferenceSession(tmp_path / "exit.onnx")
        right = sum(int((session.run(None, {"images": x.numpy()})[0].argmax(1) == y.numpy()).sum()) for x, y in images)
        assert percent(right) == row["top1"], row["exit"]


def test_transformers(run):
    model = AutoModelForImageClassification.from_pretrained(run.folder).eval()
    own = SelfDistillModel.from_pretrained(run.folder)
    x = torch.randn(2, *own.input_size)
    with torch.inference_mode():
        assert torch.equal(model(x).logits, own(x))
    data = load_images(run.images.parent)
    assert list(model.config.id2label.values()) == data.class_names
    if own.input_size[0] == 1:
        return  # transformers reads every image as RGB; the page on loading says so
    processor = AutoImageProcessor.from_pretrained(run.folder)
    files = sorted(run.images.glob("*/*.png"))
    right = 0
    with torch.inference_mode():
        for begin in range(0, len(files), 50):
            part = files[begin : begin + 50]
            logits = model(**processor([Image.open(file) for file in part])).logits
            names = [model.config.id2label[index] for index in logits.argmax(1).tolist()]
            right += sum(name == file.parent.name for name, file in zip(names, part))
    assert percent(right) == run.top1
    classify = pipeline("image-classification", model=str(run.folder), device="cpu", top_k=1)
    said = classify([str(file) for file in files], batch_size=50)
    assert percent(sum(labels[0]["label"] == file.parent.name for labels, file in zip(said, files))) == run.top1


def test_the_config_tells_nothing_of_other_weights(run):
    config = json.loads((run.folder / "config.json").read_text())
    assert not {"tag", "test_input_size", "test_crop_pct", "url", "hf_hub_id"} & config["pretrained_cfg"].keys()
    assert config["pretrained_cfg"]["crop_pct"] == 0.9
    assert config["num_classes"] == len(CLASSES)
    assert "num_classes" not in config["model_args"]
