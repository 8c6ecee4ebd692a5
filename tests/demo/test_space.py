"""A Space: its files, and their way to the Hub on loopback."""

import re
import runpy
import sys
import types

import pytest
import yaml

from timm_selfdistill import SelfDistillModel
from timm_selfdistill.demo import SPACE_FILES, stage_space
from timm_selfdistill.heads import LinearHead
from timm_selfdistill.hub import save_timm_model
from timm_selfdistill.version import __version__

from ..conftest import small_backbone, small_model
from ..programs import ROOT

MODEL = ["README.md", "exits.png", "config.json", "model.safetensors", "self_distill.safetensors"]


def push(programs, folder, *arguments: str):
    return programs.run("-m", "timm_selfdistill", "push", "run", *arguments, cwd=folder, PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_a_space_is_uploaded_with_its_model(hub, hub_programs, folder):
    done = push(hub_programs, folder, "--space", "user/page", "--private")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{hub.url}/spaces/user/page/commit/\w+\n", done.stdout)
    assert list(hub.repositories) == ["spaces/user/page"]
    space = hub.repositories["spaces/user/page"]
    files = space.files("main")
    assert space.private
    assert sorted(files) == sorted(["README.md", "app.py", "requirements.txt", *(f"model/{name}" for name in MODEL)])
    assert files["requirements.txt"].decode() == f"timm-selfdistill[demo]=={__version__}\n"
    for name in MODEL[2:]:
        assert files[f"model/{name}"] == (folder / "run/best" / name).read_bytes()
    metadata = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert metadata["sdk"] == "gradio"
    assert metadata["app_file"] == "app.py"
    assert metadata["title"] == "test_resnet, self-distilled"
    assert ("development version" in done.stderr) == ("dev" in __version__)


@pytest.mark.slow
def test_model_and_space_in_one_command_and_again(hub, hub_programs, folder):
    hub.add("spaces/user/page", {"README.md": b"mine", "notes.txt": b"mine", "model/gallery.png": b"an earlier one"})
    done = push(hub_programs, folder, "user/model", "--space", "user/page")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("/commit/") == 2
    assert "model.safetensors" in hub.repositories["user/model"].files("main")
    files = hub.repositories["spaces/user/page"].files("main")
    assert files["README.md"] == files["notes.txt"] == b"mine"
    assert "model/gallery.png" not in files  # images are uploaded only where they are asked for
    done = push(hub_programs, folder, "--space", "user/page", "--tradeoff", "run")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["spaces/user/page"].files("main")
    assert files["model/gallery.png"] == (folder / "run/gallery.png").read_bytes()
    assert "model/tradeoff.json" in files


@pytest.mark.slow
def test_a_refused_space_is_one_line(hub, hub_programs, folder):
    hub.fail("POST /api/spaces/.*/commit/", 403)
    done = push(hub_programs, folder, "--space", "user/page")
    assert done.returncode == 2
    assert re.search("the page of run/best was not uploaded: .*403: this token may not write to user/page", done.stderr)


def test_app_and_requirements_are_of_this_package(folder, tmp_path, monkeypatch):
    """The file runs as it is, with the page replaced by what is asked of it."""
    stage_space(folder / "run/best", tmp_path, folder / "run")
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names <= set(SPACE_FILES)
    opened = []
    page = types.SimpleNamespace(build_page=lambda views: views, launch_page=opened.append)
    monkeypatch.setitem(sys.modules, "timm_selfdistill.demo.page", page)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
    (views,) = opened
    assert views.recorded.images == 100
    assert views.recorded.gallery == tmp_path / "model/gallery.png"


def test_a_space_shows_a_model_with_all_its_exits(tmp_path):
    SelfDistillModel.truncate(small_model().eval(), 0).save_pretrained(tmp_path / "short", check=False)
    small_model(head=LinearHead).save_pretrained(tmp_path / "own", check=False)
    save_timm_model(small_backbone(), tmp_path / "plain")
    for name, message in (("short", "truncated.* one exit"), ("own", "heads of its own"), ("plain", "self_distill")):
        with pytest.raises(ValueError, match=message):
            stage_space(tmp_path / name, tmp_path / "space")
