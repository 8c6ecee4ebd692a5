"""`timm-selfdistill` and `examples/predict.py`, called as programs with right and wrong arguments."""

import io
import json
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from timm_selfdistill.cli import run
from timm_selfdistill.cli.main import main
from timm_selfdistill.heads import LinearHead
from timm_selfdistill.hub import save_timm_model
from timm_selfdistill.training.data.images import open_image

from .conftest import ROOT, small_backbone, small_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "model"
    model = small_model(in_chans=1)
    model.backbone.pretrained_cfg.update(label_names=[f"class {i}" for i in range(10)], input_size=(1, 32, 32))
    model.save_pretrained(folder, metrics={"exits": [{"exit": 0, "top1": 12.34}, {"exit": 1, "top1": "evil"}]})
    return folder


@pytest.fixture
def picture(tmp_path):
    Image.effect_noise((40, 30), 90).convert("RGBA").save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def call(program, monkeypatch, *arguments: object) -> int:
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        program()
    return end.value.code


def predict() -> None:
    runpy.run_path(str(ROOT / "examples/predict.py"), run_name="__main__")


def test_info_shows_exits_metrics_and_sizes(saved, monkeypatch, capsys):
    assert call(main, monkeypatch, "info", saved) == 0
    out = capsys.readouterr().out
    assert f"{saved}: test_resnet, 10 classes, 32 x 32 pixels, bottleneck heads" in out
    assert "12.34" in out
    assert "evil" not in out
    assert "1.5 MB  model.safetensors" in out


def test_info_reads_plain_networks_own_heads_and_run_directories(tmp_path, monkeypatch, capsys):
    exits = [{"exit": 0, "module": "\x1b[31mlayer4", "top1": 12.34, "macs": 10**6}]
    metrics = {"exits": exits, "dataset": {"name": "\x1b[31mred", "split": "test"}}
    save_timm_model(small_backbone(), tmp_path / "plain/best", metrics=metrics)
    small_model(head=LinearHead).save_pretrained(tmp_path / "own", metrics=metrics)
    assert call(main, monkeypatch, "info", tmp_path / "plain") == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/plain/best: test_resnet, 10 classes, 160 x 160 pixels\n" in out
    assert "12.34" in out
    assert call(main, monkeypatch, "info", tmp_path / "own") == 0
    out += capsys.readouterr().out
    assert "own heads" in out
    assert out.count("?[31mlayer4") == out.count("accuracy on ?[31mred, split test") == 2
    assert "\x1b" not in out


@pytest.mark.parametrize("settings", [5, None, {"format_version": 2, "exits": 5}])
def test_info_on_a_damaged_model_is_one_line(settings, saved, tmp_path, monkeypatch, capsys):
    config = json.loads((saved / "config.json").read_text()) | {"self_distill": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert call(main, monkeypatch, "info", tmp_path) == 2
    assert re.fullmatch("program: error: .*self_distill.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fetch"], "invalid choice: 'fetch'"),
        (["info", "nobody/nothing"], "nobody/nothing .*cache, .*offline"),
        (["info", "a/b/c"], "a/b/c .*no folder.*user/name"),
        (["push", "nowhere", "user/name"], "nowhere was not uploaded: nowhere .*config.json"),
        (["push", "{saved}", "a/b/c"], "repo_id .*'user/name' or 'name', got 'a/b/c'"),
        (["push", "{saved}", "user/name"], "{saved} was not uploaded: .*offline mode"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, saved, monkeypatch, capsys):
    assert call(main, monkeypatch, *(argument.format(saved=saved) for argument in arguments)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message.format(saved=saved), err), err


@pytest.mark.parametrize("exit", ["0", "-1", "ensemble"])
def test_predict_prints_the_classes_of_an_exit(exit, saved, picture, monkeypatch, capsys):
    assert call(predict, monkeypatch, picture, "--model", saved, "--exit", exit, "--topk", "99") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("  ")[-1] for line in lines} == {f"class {i}" for i in range(10)}
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none.jpg"], "none.jpg .*exist; .*image file"),
        (["{tmp}"], "{tmp} .*exist; .*image file"),
        (["{saved}/config.json"], "cannot read image .*config.json"),
        (["{picture}", "--exit", "4"], "exit .*0 to 3, .*'ensemble', got 4"),
        (["{picture}", "--exit=--1"], "exit .*0 to 3, .*'ensemble', got '--1'"),
        (["{picture}", "--exit", "first"], "exit .*0 to 3, .*'ensemble', got 'first'"),
        (["{picture}", "--topk", "0"], "--topk .*1, got 0"),
    ],
)
def test_predict_refuses(arguments, message, saved, picture, tmp_path, monkeypatch, capsys):
    arguments = [argument.format(tmp=tmp_path, saved=saved, picture=picture) for argument in arguments]
    assert call(predict, monkeypatch, *arguments, "--model", saved) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message.format(tmp=tmp_path), err), err


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path):
    upright = Image.effect_noise((40, 30), 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png", 1).tobytes() == upright.tobytes()


def test_a_picture_too_large_and_a_model_for_other_channels(picture, monkeypatch):
    with pytest.raises(ValueError, match="4 channels, .*1 or 3"):
        open_image(picture, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="cannot read image .*noise.png: .*decompression bomb"):
        open_image(picture, 3)


@contextmanager
def nobody_reads(monkeypatch, unbuffered: bool) -> Iterator[None]:
    """The output is a pipe whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    before = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    with os.fdopen(1, "wb", 0 if unbuffered else -1, closefd=False) as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(output, write_through=unbuffered))
        yield
        sys.stdout.flush()  # nothing is left that would fail when Python ends
    os.dup2(before, 1)
    os.close(before)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", [["recipes"], ["info", "{saved}"], ["evaluate", "--help"]])
def test_it_ends_silently_where_nobody_reads_on(arguments, unbuffered, saved, monkeypatch, capsys):
    with nobody_reads(monkeypatch, unbuffered):
        code = call(main, monkeypatch, *(argument.format(saved=saved) for argument in arguments))
    ignored = unbuffered and "--help" in arguments  # by argparse
    assert code == (0 if ignored else 141)
    assert capsys.readouterr().err == ""


def test_a_pipe_that_broke_elsewhere_is_an_error(monkeypatch, capsys):
    def send() -> None:
        raise BrokenPipeError("the Hub has gone")

    assert call(lambda: run(send), monkeypatch) == 2
    assert capsys.readouterr().err == "program: error: the Hub has gone\n"


def test_a_model_without_class_names_prints_numbers(picture, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    small_model().save_pretrained(tmp_path / "model")
    assert "label_names" not in json.loads((tmp_path / "model/config.json").read_text())
    assert call(predict, monkeypatch, picture, "--model", tmp_path / "model", "--topk", 1) == 0
    assert "class " in capsys.readouterr().out


def test_predict_and_info_take_a_truncated_model(picture, tmp_path, monkeypatch, capsys):
    small_model().eval().truncate(0).save_pretrained(tmp_path / "short", check=False)
    assert call(predict, monkeypatch, picture, "--model", tmp_path / "short", "--topk", 3) == 0
    assert capsys.readouterr().out.count("class ") == 3
    assert call(predict, monkeypatch, picture, "--model", tmp_path / "short", "--exit", 1) == 2
    assert "only one exit; leave out --exit" in capsys.readouterr().err
    assert call(main, monkeypatch, "info", tmp_path / "short") == 0
    assert "layer1" in capsys.readouterr().out
