"""Exits and stages in other runtimes."""

import importlib.util
import json
import runpy

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from timm_selfdistill import EarlyExit, wrap_self_distill
from timm_selfdistill.heads import LinearHead
from timm_selfdistill.inference import export
from timm_selfdistill.inference.export import export_onnx, export_program, export_stages
from timm_selfdistill.inference.policy import POLICIES
from timm_selfdistill.inference.staging import split_stages
from timm_selfdistill.training.data.images import open_image

from ..conftest import ROOT, small_backbone, small_model

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself


def run_file(path, *inputs) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {entry.name: value for entry, value in zip(session.get_inputs(), inputs, strict=True)})


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("test_resnet", [0, "ensemble"]),
        *(pytest.param(name, [0, 1, 2, 3, "ensemble"], marks=pytest.mark.slow) for name in ("test_resnet", "test_vit")),
    ],
)
def test_exits_with_a_batch_of_any_size(name, exits, tmp_path):
    model = small_model(name).eval()
    size = model.backbone.pretrained_cfg["input_size"]
    for exit in exits:
        export_onnx(model, tmp_path / "exit.onnx", exit)
        program = export_program(model.truncate(exit), size).module()
        for count in (1, 5):
            x = torch.randn(count, *size)
            with torch.no_grad():
                expected = model.predict(x, exit)
            torch.testing.assert_close(
                torch.from_numpy(run_file(tmp_path / "exit.onnx", x.numpy())[0]), expected, rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(program(x), expected)


def test_the_stripped_backbone_and_another_size():
    model = small_model().eval()
    program = export_program(model.strip(), (3, 64, 96)).module()
    x = torch.randn(3, 3, 64, 96)
    torch.testing.assert_close(program(x), model(x))


def test_names_are_what_a_reader_expects(tmp_path):
    export_onnx(small_model(in_chans=1), tmp_path / "exit.onnx", 0, (1, 32, 32))
    session = onnxruntime.InferenceSession(str(tmp_path / "exit.onnx"))
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape[1:], images.type) == ("images", [1, 32, 32], "tensor(float)")
    assert (logits.name, logits.shape[1:]) == ("logits", [10])
    assert isinstance(images.shape[0], str)


@pytest.mark.parametrize(
    ("name", "head", "exits"),
    [
        ("test_resnet", "linear", ["layer2"]),
        *(
            pytest.param(name, head, None, marks=pytest.mark.slow)
            for name, head in (
                ("test_resnet", "attention"),
                ("test_vit", LinearHead),
                ("test_convnext", "linear"),
                ("test_mambaout", "bottleneck"),
            )
        ),
    ],
)
def test_the_stages_one_after_the_other_are_the_network(name, head, exits, tmp_path):
    model = wrap_self_distill(small_backbone(name), exits=exits, head=head).eval()
    x = torch.randn(4, *model.backbone.pretrained_cfg["input_size"])
    with torch.no_grad():
        expected = model.forward_exits(x).logits
    paths = export_stages(model, tmp_path)
    assert [path.name for path in paths] == ["stage0.onnx", "stage1.onnx", "stage2.onnx", "stage3.onnx"][
        : len(expected)
    ]
    carried = [x.numpy()]
    for exit, path in enumerate(paths):
        logits, *carried = run_file(path, *carried)
        torch.testing.assert_close(torch.from_numpy(logits), expected[exit], rtol=1e-4, atol=1e-4)
        carried = [part[1:] for part in carried]  # the first image leaves
        expected = [part[1:] for part in expected]
    size = sum(path.stat().st_size for path in paths)
    export_onnx(model, tmp_path / "all.onnx", "ensemble")
    assert size < 1.5 * (tmp_path / "all.onnx").stat().st_size  # no stage holds what another has


class WritesInPlace(nn.Module):
    """Part of the second exit's feature is written through a view."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        first = x.mean((2, 3)) * self.scale
        feature = x * self.scale
        feature[:, :, 1:] += first[:, :, None, None]
        return first, feature.mean((2, 3))


def test_what_is_written_in_place_is_part_of_its_stage():
    model = WritesInPlace()
    shallow, deep = split_stages(export_program(model, (3, 4, 4)))
    x = torch.randn(5, 3, 4, 4)
    first, *carried = shallow(x)
    second, *nothing = deep(*(part[1:] for part in carried))
    assert torch.equal(first, model(x)[0])
    assert torch.equal(second, model(x[1:])[1])
    assert not nothing


class Transposes(WritesInPlace):
    def forward(self, x):
        columns = (x.flatten(1).T * self.scale).exp()
        return columns.sum(0)[:, None], columns.cumsum(0).T


def test_what_goes_on_must_have_a_row_for_each_image():
    with pytest.raises(ValueError, match="exp .* goes from one to another, and its rows are not the images"):
        split_stages(export_program(Transposes(), (3, 4, 4)))


@pytest.mark.slow
def test_the_example_without_torch_answers_as_early_exit_does(tmp_path):
    model = small_model().eval()
    x = torch.randn(12, 3, 160, 160) * torch.linspace(0.1, 3, 12)[:, None, None, None]
    temperatures = [0.5, 0.7, 1.0, 2.0]
    with torch.no_grad():
        likely = [(part / t).softmax(1) for part, t in zip(model.forward_exits(x).logits, temperatures)]
    model.early_exit = {"policy": "confidence", "thresholds": [0.5, None, 0.5], "temperatures": temperatures}
    export_stages(model, tmp_path)
    example = runpy.run_path(str(ROOT / "examples/onnx_early_exit.py"))
    about = json.loads((tmp_path / "stages.json").read_text())
    assert {key: about[key] for key in model.early_exit} == model.early_exit
    for policy in POLICIES:
        middle = [
            POLICIES[policy].sign * float(POLICIES[policy].confidence(part).quantile(0.5)) for part in likely[:-1]
        ]
        model.early_exit |= {"policy": policy, "thresholds": [middle[0], None, middle[2]]}
        probabilities, exits = example["predict"](tmp_path, about | model.early_exit, x.numpy())
        expected = EarlyExit(model).predict(x)
        assert exits.tolist() == expected.exit.tolist()
        assert len(set(exits.tolist())) > 1
        np.testing.assert_allclose(probabilities.max(1), expected.confidence.numpy(), rtol=1e-3)
        assert (probabilities.argmax(1) == expected.logits.argmax(1).numpy()).all()


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    model = small_model().eval()
    with pytest.raises(ValueError, match="exit .*0 to 3, .*'ensemble', got 9"):
        export_onnx(model, tmp_path / "exit.onnx", 9)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    for call in (export_onnx, export_stages):
        with pytest.raises(ImportError, match=r"needs onnxruntime: pip install 'timm-selfdistill\[onnx\]'"):
            call(model, tmp_path / "exit.onnx")
    assert not list(tmp_path.iterdir())


def test_answers_that_differ_are_not_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"exit\.onnx: onnxruntime.* differ .*torch"):
        export_onnx(small_model().eval(), tmp_path / "exit.onnx", 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(400, 240), (50, 80), (100, 100)])
def test_the_example_prepares_pictures_as_timm_does(size, tmp_path):
    noise = Image.effect_noise(size, 90).convert("RGB").resize(size)
    noise.save(tmp_path / "picture.png")
    about = {
        "input_size": [3, 96, 96],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    example = runpy.run_path(str(ROOT / "examples/onnx_early_exit.py"))
    found = example["load_image"](tmp_path / "picture.png", about)
    expected = create_transform(**about)(noise)
    np.testing.assert_allclose(found, expected.numpy(), atol=0.1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "kind", ["turned", "16 bits", "32 bits", "float", "palette", "CMYK", "transparent", "grey", "bilevel"]
)
def test_the_example_reads_files_as_training_does(kind, channels, tmp_path):
    path, image = tmp_path / "picture.tif", Image.effect_noise((60, 40), 90)
    colours = Image.merge("RGB", [image, image.rotate(180), image])
    values, exif = np.arange(2400).reshape(40, 60) / 2400, Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1
    made = {
        "16 bits": lambda: Image.fromarray((values * 65535).astype(np.uint16)),
        "32 bits": lambda: Image.fromarray((values * 65535).astype(np.int32)),
        "float": lambda: Image.fromarray((values * 255).astype(np.float32)),
        "palette": lambda: colours.quantize(16),
        "CMYK": lambda: colours.convert("CMYK"),
        "transparent": lambda: Image.merge("RGBA", [*colours.split(), image]),
        "grey": lambda: image,
        "bilevel": lambda: image.convert("1"),
        "turned": lambda: colours,
    }[kind]()
    made.save(path, exif=exif)
    about = {
        "input_size": [channels, 32, 32],
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
        "interpolation": "nearest",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    load = runpy.run_path(str(ROOT / "examples/onnx_early_exit.py"))["load_image"]
    for ranges in ({}, {"I": (100, 50000), "F": (3.0, 200.0)}):
        found = load(path, {**about, "value_ranges": ranges})
        expected = create_transform(**about)(open_image(path, channels, ranges)).numpy()
        assert found.shape == expected.shape
        assert np.isclose(found, expected, atol=1e-6).mean() > 0.9  # the two choose other nearest pixels at some edges
        assert found.std() > 0.1
