"""Everything that can go wrong on the way to the Hub."""

import re

import pytest

PUSH = """
import time
from timm_selfdistill import hub
from timm_selfdistill.hub import client, push
push.RETRY_SECONDS, client.SILENCE_SECONDS = {waits}, {silence}
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.1))  # huggingface_hub waits up to 8 s before it tries again
try:
    print(hub.push_folder({folder!r}, "user/model"{arguments}))
except Exception as error:
    print("failed:", hub.explain_failure(error, "user/model"))
"""
CREATE, PREUPLOAD, PUT, COMMIT = "POST /api/repos/create", "POST .*/preupload/", "PUT /lfs/", "POST .*/commit/"
TWICE, ONCE = (0.1, 0.1), ()

# What fails and how; seconds waited before further attempts; what is said, and how many attempts there were.
FAILURES = {
    "no token": ({}, ONCE, ", token=False", "401: .*token.*`hf auth login`.*HF_TOKEN", 1),
    "401": ({"pattern": CREATE, "status": 401}, TWICE, "", "401: .*token.*`hf auth login`.*HF_TOKEN", 1),
    "403": ({"pattern": COMMIT, "status": 403}, TWICE, "", "403: .*token .*user/model", 1),
    "404": ({"pattern": PREUPLOAD, "status": 404}, TWICE, "", "404: .*user/model .*token", 1),
    "409": ({"pattern": COMMIT, "status": 409}, TWICE, "", "409: .*another commit", 3),
    "429": ({"pattern": CREATE, "status": 429, "Retry_After": "1"}, TWICE, "", "429: .*wait 1 s", 3),
    "429 for an hour": ({"pattern": CREATE, "status": 429, "Retry_After": "3600"}, TWICE, "", "429: .*wait 3600 s", 1),
    "500": ({"pattern": COMMIT, "status": 500}, TWICE, "", "500: .*server", 3),
    "a time-out": ({"pattern": COMMIT, "status": 500, "seconds": 30}, ONCE, "", "the Hub .*in time", 1),
    "a lost connection": ({"pattern": COMMIT, "status": None}, TWICE, "", "connection .*lost", 3),
    "a connection lost in the middle of a file": ({"pattern": PUT, "status": None}, ONCE, "", "connection .*lost", 1),
}


@pytest.mark.slow
def test_whatever_fails_is_said_in_one_line_and_there_is_no_commit(hub, client, saved):
    for name, (failure, waits, arguments, message, attempts) in FAILURES.items():
        hub.repositories.clear()
        hub.objects.clear()
        hub.requests.clear()
        hub.failures.clear()
        if failure:
            hub.fail(**failure, times=99)
        silence = 2.0 if "seconds" in failure else 30.0
        said = client(PUSH.format(folder=str(saved), waits=waits, silence=silence, arguments=arguments))
        assert said.startswith("failed: "), name
        assert "\n" not in said, name
        assert re.search(message, said), (name, said)
        assert hub.count(CREATE) == attempts, name
        assert not any(repository.commits for repository in hub.repositories.values()), name


def test_what_passes_by_itself_is_tried_again(hub, client, saved):
    hub.fail(CREATE, 429, Retry_After="1")
    hub.fail(PUT, None)
    said = client(PUSH.format(folder=str(saved), waits=TWICE, silence=30.0, arguments=", commit_message='Third time'"))
    assert said.startswith(f"{hub.url}/user/model/commit/")
    files = hub.repositories["user/model"].files("main")
    assert {name: files[name] for name in ("config.json", "model.safetensors", "self_distill.safetensors")} == {
        name: (saved / name).read_bytes() for name in ("config.json", "model.safetensors", "self_distill.safetensors")
    }
    assert b"user/model" in files["README.md"]
    assert b"user/name" not in files["README.md"]
    assert "user/name" in (saved / "README.md").read_text()


def test_a_push_looks_at_what_is_there(hub, client, saved):
    push = PUSH.format(folder=str(saved), waits=ONCE, silence=30.0, arguments="{arguments}")
    card = b"---\nlicense: mit\n---\nmine"
    hub.add("user/model", {"README.md": card, "exits.png": b"an earlier model's", "notes.txt": b"mine"})
    assert hub.url in client(push.format(arguments=""))
    files = hub.repositories["user/model"].files("main")
    assert set(files) == {"config.json", "model.safetensors", "self_distill.safetensors", "README.md", "notes.txt"}
    assert files["README.md"] == card

    said = client(push.format(arguments=", private=True"))
    assert re.fullmatch("failed: user/model .*public; .*private .*another name", said)
    assert re.fullmatch("failed: user/model .*revision", client(push.format(arguments=", revision='nope'")))
    assert len(hub.repositories["user/model"].commits) == 2


def test_what_lies_beside_is_neither_uploaded_nor_removed(hub, client, copied):
    for name in ("checkpoint.pth", "pytorch_model.bin", "notes.txt", "code.py"):
        (copied / name).write_bytes(b"mine")
    hub.add("user/model", {"pytorch_model.bin": b"theirs", "old.ckpt": b"theirs"})
    said = client(PUSH.format(folder=str(copied), waits=ONCE, silence=30.0, arguments=""))
    assert said.startswith(f"{hub.url}/user/model/commit/")
    files = hub.repositories["user/model"].files("main")
    assert set(files) == {
        "config.json",
        "model.safetensors",
        "self_distill.safetensors",
        "README.md",
        "pytorch_model.bin",
        "old.ckpt",
    }
    assert files["pytorch_model.bin"] == files["old.ckpt"] == b"theirs"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_a_model_is_not_pushed(missing, copied):
    from timm_selfdistill.hub import push_folder

    (copied / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no saved model: {missing} "):
        push_folder(copied, "user/model")
