"""A process that dies while it saves leaves the old model or the new one, whole."""

import os
import signal
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_selfdistill import SelfDistillModel
from timm_selfdistill.hub.replace import COMPLETE, STALE_SECONDS, finish_replacing, replacing_files

from ..conftest import small_model


def in_a_child(work) -> int:
    """Run `work` in a forked process; how it ended, as `os.waitstatus_to_exitcode` says it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_call(monkeypatch, count: int) -> None:
    """Let the process be killed in front of the `count`-th renaming of a file or folder."""
    left = [count]

    def dying(function):
        def call(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    for name in ("rename", "replace", "rmdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}: {key}": value
        for name in ("model.safetensors", "self_distill.safetensors")
        for key, value in load_file(folder / name).items()
    }


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(1)
    return small_model().eval(), small_model().eval()


@pytest.mark.parametrize("count", range(1, 8))
def test_killed_between_two_renamings(count, models, tmp_path, monkeypatch):
    old, new = models
    old.save_pretrained(tmp_path, metrics={"name": "old"}, check=False)

    def save():
        die_at_call(monkeypatch, count)
        new.save_pretrained(tmp_path, metrics={"name": "new"}, check=False)

    assert in_a_child(save) == (-signal.SIGKILL if count <= 6 else 0)  # 4 files, and the folder's two ends
    x = torch.randn(1, 3, 64, 64)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(plain(x), old(x)) or torch.equal(plain(x), new(x))
    loaded = SelfDistillModel.from_pretrained(tmp_path)
    expected = old if count == 1 else new
    for got, wanted in zip(loaded.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(got, wanted)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(plain(x), expected(x))


def test_killed_at_any_time(models, tmp_path):
    old, new = models
    old.save_pretrained(tmp_path, check=False)
    before = weights(tmp_path)
    new.save_pretrained(tmp_path / "whole", check=False)
    after = weights(tmp_path / "whole")

    def save():
        while True:
            for model in (new, old):
                model.save_pretrained(tmp_path, check=False)

    for milliseconds in range(3, 60, 6):
        child = os.fork()
        if child == 0:
            save()
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        SelfDistillModel.from_pretrained(tmp_path)
        found = weights(tmp_path)
        assert any(
            found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
            for whole in (before, after)
        )


def test_an_error_leaves_the_old_files_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")

    def save():
        with replacing_files(tmp_path) as fresh:
            (fresh / "a").write_text("new")
            raise RuntimeError("half done")

    with pytest.raises(RuntimeError, match="half done"):
        save()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_nothing_is_moved_through_links(tmp_path):
    elsewhere, first, second = (tmp_path / name for name in ("elsewhere", "first", "second"))
    for folder in (elsewhere, first, second / COMPLETE):
        folder.mkdir(parents=True)
    (elsewhere / "secret").write_text("theirs")
    (first / COMPLETE).symlink_to(elsewhere)
    (second / COMPLETE / "config.json").symlink_to(elsewhere / "secret")
    for folder in (first, second):
        finish_replacing(folder)
        assert [path.name for path in folder.iterdir()] == [COMPLETE]
    assert (elsewhere / "secret").read_text() == "theirs"


def test_what_killed_processes_left_is_removed_an_hour_later(tmp_path):
    left, young = tmp_path / ".saving-1", tmp_path / ".saving-2"
    for folder in (left, young):
        folder.mkdir()
    os.utime(left, (0, time.time() - STALE_SECONDS - 1))
    with replacing_files(tmp_path) as fresh:
        (fresh / "a").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".saving-2"}
