"""The real huggingface_hub client and a Hub on loopback: pushing, and loading in another process."""
import pytest

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


def test_a_pushed_model_loads_and_only_its_files_are_fetched(hub, interpreter):
    url = interpreter(MODEL + "print(model.push_to_hub('user/model', private=True))")
    assert url.startswith(f"{hub.url}/user/model/commit/")
    repository = hub.repositories["user/model"]
    assert repository.private
    assert set(repository.files("main")) == {
        "config.json", "model.safetensors", "self_distill.safetensors", "README.md"}
    assert b'SelfDistillModel.from_pretrained("user/model")' in repository.files("main")["README.md"]

    hub.add("user/model", {"evil.py": b"raise SystemExit"})
    assert interpreter(MODEL + """
loaded = SelfDistillModel.from_pretrained("user/model")
for got, expected in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
    assert torch.equal(got, expected)
print("equal")
""").endswith("equal")
    assert hub.count("GET .*resolve") > 0
    assert hub.count("resolve/.*(evil.py|README.md)") == 0

    interpreter(MODEL + "model.save_pretrained('saved', push_to_hub=True, commit_message='Again')")
    assert "user/saved" in hub.repositories


def test_branches_pull_requests_and_what_stands_in_the_way(hub, interpreter, pushed):
    first = pushed.revisions["main"]
    interpreter(MODEL + "model.push_to_hub('user/model', revision='main', create_pr=True)")
    assert pushed.revisions["main"] == first
    assert "refs/pr/1" in pushed.revisions

    hub.add("user/model", {"config.json": b"{}"})
    assert "layer1" in interpreter(LOAD.format(arguments=f", revision={first!r}"))
    assert "FileNotFoundError user/model has no revision 'nope'" in interpreter(
        LOAD.format(arguments=", revision='nope'"))

    before = len(hub.requests)
    hub.add("user/model", {"pytorch_model.bin": b"\x80\x04"})
    assert "ValueError user/model holds 'pytorch_model.bin'" in interpreter(LOAD.format(arguments=""))
    assert not any("resolve" in request for request in hub.requests[before:])


def test_offline_a_cached_model_loads_and_another_says_so(client, pushed):
    missing = client(LOAD.format(arguments=""), HF_HUB_OFFLINE="1").stdout
    assert missing.startswith("FileNotFoundError user/model is no folder here and not in the cache, and the Hub may")
    assert "not be asked (offline)" in missing
    client(LOAD.format(arguments=""))
    assert "layer1" in client(LOAD.format(arguments=""), HF_HUB_OFFLINE="1").stdout


REFUSALS = [
    (401, {"X_Error_Code": "RepoNotFound"}, "FileNotFoundError user/model is no folder here, and no repository on the"),
    (403, {"X_Error_Code": "GatedRepo"}, "PermissionError user/model is gated"),
    (403, {}, "OSError the Hub answers 403 for user/model"),
]


def test_a_refusal_is_one_clear_error_until_the_model_is_in_the_cache(hub, interpreter, pushed):
    for status, headers, message in REFUSALS:
        hub.failures.clear()
        hub.fail("GET /api/models/user/model", status, times=9, **headers)
        assert message in interpreter(LOAD.format(arguments=""))
    hub.failures.clear()
    assert "layer1" in interpreter(LOAD.format(arguments=""))
    assert "layer1" in interpreter(LOAD.format(arguments=", local_files_only=True"))
    hub.fail("GET /api/models/user/model", 403, times=99)
    assert "layer1" in interpreter(LOAD.format(arguments=""))


def test_what_gets_lost_on_the_way_is_one_clear_error(hub, interpreter, pushed):
    interpreter("from huggingface_hub import constants; constants.HF_HUB_DOWNLOAD_TIMEOUT = 1")
    for failure, message in (
            ({"status": None}, "OSError user/model cannot be fetched: the connection to the Hub is lost (peer closed"),
            ({"status": 500, "seconds": 3}, "OSError user/model cannot be fetched: the Hub does not answer in time")):
        hub.failures.clear()
        hub.fail("GET /lfs/", times=99, **failure)
        said = interpreter(LOAD.format(arguments=""))
        assert said.startswith(message)
        assert "\n" not in said
    hub.failures.clear()
    interpreter("constants.HF_HUB_DOWNLOAD_TIMEOUT = 60")
    assert "layer1" in interpreter(LOAD.format(arguments=""))


def test_a_truncated_model_is_pushed_and_loaded(hub, interpreter):
    said = interpreter(MODEL + """
small = model.truncate(0)
small.push_to_hub("user/small")
loaded = SelfDistillModel.from_pretrained("user/small")
x = torch.randn(2, 3, 160, 160)
assert torch.equal(loaded(x), model.predict(x, 0))
print(type(loaded).__name__, loaded.exit)
""")
    assert said == "TruncatedModel 0"
    card = hub.repositories["user/small"].files("main")["README.md"]
    assert b'SelfDistillModel.from_pretrained("user/small")(images)' in card
