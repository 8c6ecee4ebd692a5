import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_selfdistill import SelfDistillModel, model_data_config, wrap_self_distill
from timm_selfdistill.cli.demo import open_views
from timm_selfdistill.demo import Views

CLASSES = [*(f"class {index}" for index in range(9)), "<b>bold</b> ${7*7} {{7*7}}"]
"""The last would show if a name were taken for HTML or for a template."""
THRESHOLDS = [0.3, None, 0.3]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A run with a model that is calibrated, and pictures to drop."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("demo")
    model = make_model()
    rows = [
        {"exit": exit, "module": row.module, "top1": 50.0 + 10 * index, "macs": row.macs, "share": row.share}
        for index, (exit, row) in enumerate(zip([0, 1, 2, 3, "ensemble"], model.summary((3, 32, 32))))
    ]
    dataset = {"name": "shoes", "type": "shoes", "split": "test", "images": 400}
    model.save_pretrained(folder / "run/best", metrics={"exits": rows, "dataset": dataset}, check=False)
    (folder / "run/tradeoff.json").write_text(json.dumps(tradeoff(rows)))
    Image.new("RGB", (60, 40), "white").save(folder / "run/gallery.png")
    Image.effect_noise((40, 30), 90).convert("RGB").save(folder / "noise.png")
    (folder / "notes.txt").write_text("no picture")
    Image.new("L", (8000, 6250)).save(folder / "large.png")
    return folder


def make_model() -> SelfDistillModel:
    """Whose exits differ in what they say, and are more sure the deeper they are."""
    backbone = timm.create_model("test_resnet", num_classes=10)
    model_data_config(backbone, 32, 3, class_names=CLASSES)
    model = wrap_self_distill(backbone).eval()
    with torch.no_grad():
        for index, head in enumerate([*model.heads, backbone]):
            linear = [module for module in head.modules() if isinstance(module, torch.nn.Linear)][-1]
            linear.weight.zero_()
            linear.bias.copy_(torch.nn.functional.one_hot(torch.tensor(9 - index), 10) * (1.0 + index))
    model.early_exit = {
        "policy": "confidence",
        "thresholds": THRESHOLDS,
        "temperatures": [1.0, 1.0, 2.0, 1.0],
        "accuracy": 61.0,
        "plain_accuracy": 60.0,
        "macs": 1e6,
        "plain_macs": 2e6,
    }
    return model


def tradeoff(rows: list[dict]) -> dict:
    curve = [{"threshold": 0.5, "top1": 50.0, "macs": rows[0]["macs"]}, {"threshold": None, "top1": "?", "macs": 1}]
    return {"model": "m", "images": 100, "exits": rows, "early_exit": curve, "calibrated": rows[1], "baseline": None}


@pytest.fixture(scope="session")
def views(folder) -> Views:
    return open_views(str(folder / "run"))
