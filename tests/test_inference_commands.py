"""evaluate, calibrate, tradeoff and export as programs, with right and wrong arguments."""

import json
import re

import onnxruntime
import pytest
import timm
import torch

from timm_selfdistill import EarlyExit, SelfDistillModel, load_images, model_data_config, wrap_self_distill
from timm_selfdistill.cli.main import _parser
from timm_selfdistill.cli.opening import load_any_model
from timm_selfdistill.cli.train_flags import train_parser
from timm_selfdistill.hub import save_timm_model
from timm_selfdistill.inference.evaluation import smallest_that_pays

from .conftest import EMBEDDED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """320 images, a self-distilled model, and a plain one, all of which know the same classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inference")
    images = load_images(EMBEDDED)
    images.train.select(range(50)).to_parquet(folder / "data/train.parquet")
    images.val.select(range(320)).to_parquet(folder / "data/test.parquet")
    for name in ("model", "plain"):
        backbone = timm.create_model("test_resnet", num_classes=10, in_chans=1)
        model_data_config(backbone, 32, 1, class_names=images.class_names)
        if name == "model":
            wrap_self_distill(backbone).save_pretrained(
                folder / "run/best", metrics={"exits": [{"exit": 0, "top1": 12.0}]}, check=False
            )
        else:
            save_timm_model(backbone, folder / "plain")
    return folder


def test_calibrate_saves_what_evaluate_and_python_use(call, folder):
    code, out, _ = call(
        "calibrate",
        "run",
        "--data",
        "data",
        "--max-accuracy-drop",
        "90",
        "--policy",
        "entropy",
        "--output",
        "calibrated",
    )
    assert code == 0
    assert "max_accuracy_drop 90: met on 106 images" in out
    config = json.loads((folder / "calibrated/config.json").read_text())["self_distill"]
    assert config["early_exit"]["policy"] == "entropy"
    assert config["metrics"] == {"exits": [{"exit": 0, "top1": 12.0}]}
    code, out, _ = call("evaluate", "calibrated", "--data", "data")
    assert code == 0
    assert "thresholds were calibrated on these images" in out
    assert "calibrated on these images" not in call("evaluate", "calibrated", "--data", "data", "--split", "train")[1]
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert list(rows) == ["0", "1", "2", "3", "ensemble", "early"]
    assert all(re.search(r"\d\.\d\dx", row) for row in rows.values())
    sizes = ", ".join(rf"{2**power}: \d+\.\d\dx" for power in range(7))
    assert re.search(
        rf"early exit (pays off in batches of \d+ or more|does not pay off in batches up to 64): {sizes}\n", out
    )
    assert "early exit: entropy, thresholds [" in call("info", "calibrated")[1]
    found = EarlyExit(SelfDistillModel.from_pretrained(folder / "calibrated"))
    assert found.policy == "entropy"


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1: 1.1, 2: 0.6, 4: 0.9, 8: 1.2, 16: 1.3}, 8),
        ({1: 1.1, 2: 1.2}, 1),
        ({1: 1.1, 2: 1.01}, None),
        ({1: 0.8}, None),
    ],
)
def test_the_smallest_batch_at_which_early_exit_pays(speedups, expected):
    assert smallest_that_pays(speedups) == expected


def test_a_budget_that_is_not_met_saves_nothing(call, folder):
    before = (folder / "run/best/config.json").read_text()
    code, out, _ = call("calibrate", "run", "--data", "data", "--max-macs", "1")
    assert code == 1
    assert "max_macs 1: NOT MET" in out
    assert "nothing was saved" in out
    assert (folder / "run/best/config.json").read_text() == before


@pytest.mark.slow
def test_calibrate_says_where_thresholds_amount_to_one_exit(call, folder):
    macs = [row.macs for row in SelfDistillModel.from_pretrained(folder / "run/best").summary((1, 32, 32))]
    code, out, _ = call("calibrate", "run", "--data", "data", "--max-macs", macs[0], "--output", "first")
    assert code == 0
    assert "all images leave at exit 0, as with truncate(0)" in out
    code, out, _ = call("calibrate", "run", "--data", "data", "--max-accuracy-drop", "0", "--output", "safe")
    report = json.loads((folder / "safe/config.json").read_text())["self_distill"]["early_exit"]
    assert ("this is the plain network" in out) == (report["shares"] == [0, 0, 0, 1])
    rows = call("evaluate", "first", "--data", "data")[1].splitlines()
    top1 = {line.split("│")[1].strip(): line.split("│")[3].strip() for line in rows if line.startswith("│")}
    assert top1["early"] == top1["0"]


def test_tradeoff_draws_what_it_writes_down(call, folder):
    code, out, _ = call("tradeoff", "run", "--data", "data", "--baseline", "plain", "--output", "pictures")
    assert code == 0
    found, written = out.splitlines()
    assert found.startswith("test: 320 images of 10 classes in ")
    assert written == "wrote pictures/tradeoff.json, pictures/exits.png, pictures/gallery.png"
    written = json.loads((folder / "pictures/tradeoff.json").read_text())
    macs = [row["macs"] for row in written["exits"]]
    curve = written["early_exit"]
    assert [row["exit"] for row in written["exits"]] == [0, 1, 2, 3, "ensemble"]
    assert curve[0]["macs"] == macs[0]
    assert curve[0]["top1"] == pytest.approx(written["exits"][0]["top1"])
    assert curve[-1]["macs"] == macs[3]
    assert curve[-1]["top1"] == pytest.approx(written["exits"][3]["top1"])
    assert written["baseline"]["macs"] == macs[3]
    assert written["calibrated"] is None
    for name in ("exits.png", "gallery.png"):
        assert (folder / "pictures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
@pytest.mark.slow
def test_export_writes_one_exit_or_every_stage(call, folder):
    assert call("export", "run", "--exit", "0", "--output", "exit0.onnx")[:2] == (0, "wrote exit0.onnx\n")
    assert onnxruntime.InferenceSession(folder / "exit0.onnx").get_inputs()[0].shape[1:] == [1, 32, 32]
    code, out, _ = call("export", "run", "--staged", "--output", "stages")
    assert code == 0
    assert out == "wrote stage0.onnx, stage1.onnx, stage2.onnx, stage3.onnx and stages.json to stages\n"
    about = json.loads((folder / "stages/stages.json").read_text())
    assert about["class_names"][9] == "Ankle boot"
    assert about["thresholds"] == [None, None, None]


def save_short(folder) -> None:
    if not (folder / "short").exists():
        SelfDistillModel.from_pretrained(folder / "run/best").truncate(0).save_pretrained(folder / "short", check=False)


def test_a_truncated_model_is_evaluated_as_its_exit(call, folder):
    save_short(folder)
    rows = [
        [
            line.split("│")[3].strip()
            for line in call("evaluate", name, "--data", "data")[1].splitlines()
            if line.startswith("│")
        ]
        for name in ("short", "run")
    ]
    assert rows[0] == rows[1][:1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
@pytest.mark.parametrize("name", ["short", "plain"])
def test_export_of_a_network_with_one_exit(name, call, folder):
    save_short(folder)
    assert call("export", name, "--output", "one.onnx")[0] == 0
    model = load_any_model(str(folder / name), None)
    x = torch.randn(5, 1, 32, 32)
    (logits,) = onnxruntime.InferenceSession(folder / "one.onnx").run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-3, atol=1e-4)


def test_calibration_under_other_preprocessing_is_saved_with_it(call, folder):
    code, out, _ = call(
        "calibrate", "run", "--data", "data", "--max-accuracy-drop", "90", "--crop-pct", "0.5", "--output", "cropped"
    )
    assert code == 0
    assert "run/best is evaluated with crop_pct 0.5 instead of 0.95" in out
    config = json.loads((folder / "cropped/config.json").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == 0.5
    assert config["self_distill"]["metrics"] == {"exits": [{"exit": 0}]}  # accuracy is that of other preprocessing


NOT_MEASURED = {"num_classes", "in_chans", "input_size", "streaming", "class_map", "fit_img_size"}
"""Classes and channels are those of the network that is measured, and images are not streamed."""


def test_measuring_commands_have_the_image_flags_of_training():
    groups = {group.title: group for group in train_parser("", "")._action_groups}
    flags = {action.dest for action in groups["data"]._group_actions} - NOT_MEASURED | {"seed"}
    commands = next(action for action in _parser()._actions if hasattr(action, "choices") and action.choices).choices
    for name in ("evaluate", "calibrate", "tradeoff", "flat-minima", "gradients", "separability", "agreement"):
        options = {action.dest: action for action in commands[name]._actions}
        assert flags <= options.keys(), name
        for action in groups["data"]._group_actions:
            if action.dest in flags - {"data_dir", "val_split"}:
                assert options[action.dest].option_strings == action.option_strings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "run"], "run/best .*images of its run; give --data-dir FOLDER or --dataset NAME"),
        (["evaluate", "nowhere", "--data", "data"], "nowhere .*no folder here"),
        (["evaluate", "run", "--data", "nowhere"], "nowhere .*folder or file"),
        (["evaluate", "run", "--data", "data", "--split", "nope"], "has no split 'nope'"),
        (["calibrate", "plain", "--data", "data", "--max-macs", "1"], 'plain.*"self_distill".*timm.create_model'),
        (["calibrate", "short", "--data", "data", "--max-macs", "1"], "short .*truncated.* one exit"),
        (["tradeoff", "short", "--data", "data"], "short .*truncated.* one exit"),
        (["export", "short", "--exit", "1", "--output", "x"], "one exit only, got exit 1"),
        (["export", "short", "--staged", "--output", "x"], "only one exit.* --staged"),
        (["export", "plain", "--exit", "ensemble", "--output", "x"], "one exit only, got exit 'ensemble'"),
        (
            ["evaluate", "run", "--data-dir", "data", "--dataset", "user/images"],
            "--data-dir data and --dataset .*leave one out",
        ),
        (["evaluate", "other", "--data", "data"], "3 classes, but data has 10 "),
        (["calibrate", "run", "--data", "data"], "one of max_accuracy_drop, max_macs, min_speedup, got none"),
        (["calibrate", "run", "--data", "data", "--max-macs", "1", "--min-speedup", "2"], "got max_macs, min_speedup"),
        (["calibrate", "user/name", "--data", "data", "--min-speedup", "2"], "user/name .*--output"),
        (["calibrate", "run", "--data", "data", "--split", "train", "--min-speedup", "2"], "300 images, got 50"),
        (["tradeoff", "run", "--data", "data", "--baseline", "nowhere"], "--baseline nowhere .*not the folder"),
        (["tradeoff", "run", "--data", "data", "--policy", "luck"], "--policy.*'luck'"),
        (["export", "run"], "required: --output"),
        (["export", "run", "--exit", "7", "--output", "x"], "exit .*0 to 3, .*'ensemble', got 7"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, call, folder):
    save_short(folder)
    if not (folder / "other").exists():
        other = timm.create_model("test_resnet", num_classes=3, in_chans=1)
        wrap_self_distill(other).save_pretrained(folder / "other", check=False)
    code, _, err = call(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err), err
