"""What the page shows of a picture, and its messages; without gradio."""

import importlib.util
import re
import sys

import pytest
import torch
from PIL import Image

from timm_selfdistill import EarlyExit
from timm_selfdistill.cli.demo import open_views
from timm_selfdistill.cli.main import main
from timm_selfdistill.demo import Classifier
from timm_selfdistill.demo.picture import read_picture

from ..conftest import small_model
from .conftest import THRESHOLDS


@pytest.mark.parametrize("thresholds", [0.0, 0.2, 0.4, 0.6, 1.0, THRESHOLDS, [None, None, None]])
def test_a_picture_leaves_where_early_exit_lets_it_leave(thresholds, views, folder):
    classifier = views.classifier
    image = read_picture(folder / "noise.png", 3)
    answers = classifier.answer(image)
    leaving = classifier.leave(answers, thresholds)
    temperatures = classifier.early_exit.temperatures
    expected = EarlyExit(classifier.model, thresholds, "confidence", temperatures).predict(
        classifier.transform(image)[None]
    )
    assert leaving.exit == expected.exit.item()
    torch.testing.assert_close(answers.probabilities[leaving.exit].amax().float(), expected.confidence[0])


def test_the_share_of_the_compute_is_that_of_the_heads_and_layers_that_run(views, folder):
    classifier = views.classifier
    answers = classifier.answer(read_picture(folder / "noise.png", 3))
    rows = list(classifier.model.summary((3, 32, 32)))
    first, last = (classifier.leave(answers, threshold) for threshold in (0.0, 1.0))
    assert first.share == pytest.approx(rows[0].share)
    assert first.exit == 0
    assert last.exit == 3
    assert 1 < last.share < 1.2
    assert classifier.leave(answers, [None, None, None]).share == 1


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin"])
def test_confidence_is_in_the_unit_of_the_threshold(policy):
    model = small_model().eval()
    model.early_exit = {"policy": policy, "thresholds": [0.5] * 3, "temperatures": [1.0] * 4}
    classifier = Classifier(model)
    answers = classifier.answer(Image.effect_noise((40, 30), 90).convert("RGB"))
    assert 0 <= classifier.first_threshold <= classifier.highest
    own = classifier.confidences(answers)[0]
    assert classifier.leave(answers, own).exit == 0
    stricter = own + 0.01 if policy != "entropy" else own - 0.01
    assert classifier.leave(answers, [stricter, None, None]).exit == 3


def test_the_page_shows_the_classes_of_every_exit(views, folder):
    answers, html = views.open(str(folder / "noise.png"), 1.0, calibrated=False)
    assert re.findall("<h3>exit (.) <span>(.*?)</span>", html) == [
        (str(exit), module) for exit, module in enumerate(views.classifier.model.exits)
    ]
    assert html.count('class="sd-bar"') == 4 * 5
    assert 'data-exit="3"' in html
    assert "<b>bold" not in html
    assert "&lt;b&gt;bold&lt;/b&gt; ${7*7} {{7*7}}" in html
    shallow = views.show(answers, 0.0, calibrated=False)
    assert 'data-exit="0"' in shallow
    assert shallow.count("not run") == 3
    assert "The deepest exit says class 6" in shallow
    assert views.show(answers, 0.0, calibrated=True) == views.show(answers, 1.0, calibrated=True)
    assert "no threshold: passed" in views.show(answers, 0.0, calibrated=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "notes.txt is not a picture that can be read; drop a JPEG, PNG or WebP file"),
        ("large.png", r"large.png has 50.0 megapixels \(8000 x 6250\); this page takes up to 25: make it smaller"),
        ("half.png", "cannot read image half.png: "),
        ("bomb.png", "bomb.png has far too many pixels; this page takes up to 25"),
    ],
)
def test_what_is_no_picture_gets_a_message(name, message, views, folder, tmp_path, monkeypatch):
    path = folder / name
    if name == "half.png":
        path = tmp_path / name
        path.write_bytes((folder / "noise.png").read_bytes()[:400])
    if name == "bomb.png":
        path = tmp_path / name
        Image.new("L", (100, 100)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    answers, html = views.open(str(path), 0.5, calibrated=False)
    assert answers is None
    assert 'role="alert"' in html
    assert re.search(message, html), html
    assert str(tmp_path) not in html


def test_nothing_dropped_is_a_hint(views):
    assert "Drop a picture" in views.open(None, 0.5, calibrated=True)[1]
    assert views.show(None, 0.5, calibrated=True) == views.open(None, 0.5, calibrated=True)[1]


def call(monkeypatch, capsys, *arguments: str) -> str:
    """The error of a command that ends with exit code 2: one line."""
    monkeypatch.setattr(sys, "argv", ["timm-selfdistill", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_without_gradio_the_command_says_what_to_install(folder, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gradio" else find_spec(name))
    monkeypatch.setitem(sys.modules, "gradio", None)  # so that to import it raises
    err = call(monkeypatch, capsys, "demo", str(folder / "run"))
    assert "error: the demo needs gradio: pip install 'timm-selfdistill[demo]'" in err
    assert open_views(str(folder / "run")).header()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "required: model"),
        (["demo", "run", "--port", "99999"], "--port.* from 1 to 65535, got 99999"),
        (["push", "run"], "push run needs a destination: give USER/NAME for the model, --space USER/NAME, or both"),
        (["push", "run", "user/name", "--tradeoff", "run"], "--tradeoff run .*--space USER/NAME"),
        (["push", "run", "--space", "a/b/c"], "--space must be 'user/name' or 'name', got 'a/b/c'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    err = call(monkeypatch, capsys, *arguments)
    assert re.search(message, err), err
