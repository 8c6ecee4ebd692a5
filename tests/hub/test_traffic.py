"""The real huggingface_hub client and a Hub on loopback: pushing, and loading in another process."""

import re

import pytest
import torch

from ..conftest import small_model

MODEL = """
import timm, torch
from timm_selfdistill import SelfDistillModel, wrap_self_distill
torch.manual_seed(0)
model = wrap_self_distill(timm.create_model("test_resnet", num_classes=7)).eval()
"""
LOAD = """
import sys
from timm_selfdistill import SelfDistillModel
try:
    print(SelfDistillModel.from_pretrained("user/model"{arguments}).exits)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def pushed(hub, tmp_path):
    """A repository with a model in it."""
    small_model().save_pretrained(tmp_path / "pushed")
    hub.add("user/model", {path.name: path.read_bytes() for path in (tmp_path / "pushed").iterdir()})
    return hub.repositories["user/model"]


def test_a_pushed_model_loads_and_only_its_files_are_fetched(hub, client):
    url = client(MODEL + "print(model.push_to_hub('user/model', private=True))")
    assert url.startswith(f"{hub.url}/user/model/commit/")
    repository = hub.repositories["user/model"]
    assert repository.private
    assert set(repository.files("main")) == {
        "config.json",
        "model.safetensors",
        "self_distill.safetensors",
        "README.md",
    }
    assert b'SelfDistillModel.from_pretrained("user/model")' in repository.files("main")["README.md"]

    hub.add("user/model", {"evil.py": b"raise SystemExit"})
    assert client(
        MODEL
        + """
loaded = SelfDistillModel.from_pretrained("user/model")
for got, expected in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
    assert torch.equal(got, expected)
print("equal")
"""
    ).endswith("equal")
    assert hub.count("GET .*resolve") > 0
    assert hub.count("resolve/.*(evil.py|README.md)") == 0

    client(MODEL + "model.save_pretrained('saved', push_to_hub=True, commit_message='Again')")
    assert "user/saved" in hub.repositories


def test_branches_pull_requests_and_what_stands_in_the_way(hub, client, pushed):
    first = pushed.revisions["main"]
    client(MODEL + "model.push_to_hub('user/model', revision='main', create_pr=True)")
    assert pushed.revisions["main"] == first
    assert "refs/pr/1" in pushed.revisions

    hub.add("user/model", {"config.json": b"{}"})
    assert "layer1" in client(LOAD.format(arguments=f", revision={first!r}"))
    said = client(LOAD.format(arguments=", revision='nope'"))
    assert re.match("FileNotFoundError user/model .*revision 'nope'", said)

    hub.add("user/model", {"config.json": pushed.commits[first]["config.json"], "pytorch_model.bin": b"\x80\x04"})
    before = len(hub.requests)
    assert "layer1" in client(LOAD.format(arguments=""))
    assert not any("pytorch_model.bin" in request for request in hub.requests[before:])
    before = len(hub.requests)
    hub.add("user/model", {"model.safetensors": None})
    assert re.match(
        "ValueError user/model has no model.safetensors, only 'pytorch_model.bin'", client(LOAD.format(arguments=""))
    )
    assert not any("resolve" in request for request in hub.requests[before:])


@pytest.mark.parametrize("load", ["SelfDistillModel.from_pretrained", "load_pretrained"])
def test_all_files_are_of_the_commit_that_the_first_is_of(load, hub, client, pushed, tmp_path):
    torch.manual_seed(1)
    small_model(exits=["layer3"], num_classes=4).save_pretrained(tmp_path / "other")
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    first, pushes = pushed.revisions["main"], []

    def push() -> None:
        pushes.append(hub.add("user/model", other))

    hub.before("GET .*resolve/.*/config.json", push)
    said = client(
        LOAD.format(arguments="")
        .replace("SelfDistillModel.from_pretrained", load)
        .replace("import SelfDistillModel", "import SelfDistillModel, load_pretrained")
    )
    assert "layer1" in said
    assert len(pushes) == 1
    weights = [request for request in hub.requests if "resolve" in request and "safetensors" in request]
    assert weights
    assert all(f"/resolve/{first}/" in request for request in weights)
    assert client(LOAD.format(arguments="")) == "('layer3', 'layer4')"
    assert client(LOAD.format(arguments=", local_files_only=True")) == "('layer3', 'layer4')"


def test_offline_a_cached_model_loads_and_another_says_so(client, pushed):
    load = LOAD.format(arguments="")
    client(load)
    missing, found = client(load.replace("user/model", "user/other") + load, fresh=True, HF_HUB_OFFLINE="1").split("\n")
    assert re.match("FileNotFoundError user/other .*no folder here .*cache, .*offline", missing)
    assert "layer1" in found


REFUSALS = [
    (401, {"X_Error_Code": "RepoNotFound"}, "FileNotFoundError user/model .*no repository .*`hf auth login`.*token="),
    (403, {"X_Error_Code": "GatedRepo"}, "PermissionError user/model .*gated.*`hf auth login`"),
    (403, {}, "OSError .*403 .*user/model"),
]


def test_a_refusal_is_one_clear_error_until_the_model_is_in_the_cache(hub, client, pushed):
    for status, headers, message in REFUSALS:
        hub.failures.clear()
        hub.fail("GET /api/models/user/model", status, times=9, **headers)
        assert re.match(message, client(LOAD.format(arguments="")))
    hub.failures.clear()
    assert "layer1" in client(LOAD.format(arguments=""))
    assert "layer1" in client(LOAD.format(arguments=", local_files_only=True"))
    hub.fail("GET /api/models/user/model", 403, times=99)
    assert "layer1" in client(LOAD.format(arguments=""))


@pytest.mark.slow
def test_what_gets_lost_on_the_way_is_one_clear_error(hub, client, pushed):
    impatient = """
import time
from huggingface_hub import constants
constants.HF_HUB_DOWNLOAD_TIMEOUT = 1
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.1))
"""
    for failure, message in (
        ({"status": None}, r"OSError user/model .*connection .*lost \(peer closed"),
        ({"status": 500, "seconds": 3}, "OSError user/model .*the Hub .*in time"),
    ):
        hub.failures.clear()
        hub.fail("GET /lfs/", times=99, **failure)
        said = client(impatient + LOAD.format(arguments=""))
        assert re.match(message, said), said
        assert "\n" not in said
    hub.failures.clear()
    assert "layer1" in client(LOAD.format(arguments=""))


def test_a_truncated_model_is_pushed_and_loaded(hub, client):
    said = client(
        MODEL
        + """
small = model.truncate(0)
small.push_to_hub("user/small")
from timm_selfdistill import TruncatedModel
loaded = TruncatedModel.from_pretrained("user/small")
x = torch.randn(2, 3, 160, 160)
assert torch.equal(loaded(x), model.predict(x, 0))
print(type(loaded).__name__, loaded.exit)
"""
    )
    assert said == "TruncatedModel 0"
    card = hub.repositories["user/small"].files("main")["README.md"]
    assert b'TruncatedModel.from_pretrained("user/small")(images)' in card
