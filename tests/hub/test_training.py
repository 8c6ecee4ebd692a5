"""Training runs that push, as a user starts them, and what others load."""

import json
import re
import subprocess
import sys
import threading

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from timm_selfdistill import load_images
from timm_selfdistill.training.outputs import upload
from timm_selfdistill.training.runtime.progress import ProgressReporter

from ..conftest import EMBEDDED, small_model, wait_for
from ..programs import HANGS, ROOT
from .server import TOKEN


@pytest.fixture
def flags(tmp_path):
    """Of a short run on few images."""
    images = load_images(EMBEDDED)
    images.train.select(range(256)).to_parquet(tmp_path / "images/train.parquet")
    images.val.select(range(64)).to_parquet(tmp_path / "images/test.parquet")
    images.val[0]["image"].save(tmp_path / "boot.png")
    return [
        str(ROOT / "examples/train.py"),
        "--data-dir",
        tmp_path / "images",
        "--output",
        tmp_path / "run",
        "--model",
        "test_resnet",
        "-b",
        32,
        "-j",
        0,
        "--push-to-hub",
        "--hub-model-id",
        "user/model",
    ]


LOGITS = """
import torch
x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
"""


@pytest.mark.slow
def test_pushed_every_epoch_without_waiting_and_loaded_by_both_readers(
    hub, hub_programs, client, command, flags, tmp_path
):
    hub_answers = hub.hold("POST .*/preupload/")
    run = hub_programs.start(
        *flags, "--epochs", 3, "--hub-strategy", "epoch", "--hub-private", cwd=tmp_path, processes=2
    )

    def waits_for_the_last_upload() -> bool:
        return any("speedup" in path.read_text() for path in (tmp_path / "run").glob(".upload-*/config.json"))

    wait_for(lambda: waits_for_the_last_upload() or run.poll() is not None)
    assert (tmp_path / "run/summary.json").exists()  # trained to the end while the Hub has not said a word
    assert not hub.repositories["user/model"].commits
    hub_answers.set()
    done = run.wait()
    assert done.returncode == 0, done.stderr

    repository = hub.repositories["user/model"]
    assert repository.private
    assert len(repository.commits) == 2  # the first epoch's, and the best: the second's was left out while it waited
    assert hub.count("POST /api/repos/create") == 3  # at the start and for each upload, from one of the two processes
    assert re.search(rf"on the Hub: {hub.url}/user/model/commit/\w{{40}}$", done.stdout, re.MULTILINE)
    assert not list((tmp_path / "run").glob(".upload-*"))
    files = repository.files("main")
    for name in ("config.json", "model.safetensors", "self_distill.safetensors", "exits.png"):
        assert files[name] == (tmp_path / "run/best" / name).read_bytes()

    card = ModelCard(files["README.md"].decode())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert len(card.data.eval_results) == 2 * len(summary["exits"])
    assert "hf-hub:user/model" in card.text
    assert all(f"{row['speedup']:.2f}x" in card.text for row in summary["exits"])
    assert "On 64 images of images (split `test`), 32 x 32 pixels" in card.text
    published = b"".join(files.values())
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert TOKEN.encode() not in published + written + (done.stdout + done.stderr).encode()
    assert str(tmp_path).encode() not in published

    client(
        LOGITS
        + """
from timm_selfdistill import SelfDistillModel
model = SelfDistillModel.from_pretrained("user/model")
torch.save(model(x), "logits.pt")
"""
    )
    client(
        LOGITS
        + """
import sys, timm
model = timm.create_model("hf-hub:user/model", pretrained=True).eval()
assert torch.equal(model(x), torch.load("logits.pt"))
assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
assert model.pretrained_cfg["label_names"][9] == "Ankle boot"
assert "timm_selfdistill" not in sys.modules
""",
        fresh=True,
    )
    predict = [sys.executable, ROOT / "examples/predict.py", tmp_path / "boot.png", "--model", "user/model"]
    lines = command(*predict, "--exit", 0).stdout.splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r" *\d+\.\d\d%  [\w/ -]+", line) for line in lines)


@pytest.mark.slow
def test_a_process_that_has_pushed_ends(hub, environment, flags, tmp_path):
    """A new one, with all that Python does at its end: a fork of the other tests leaves out the last part."""
    done = subprocess.run(
        [sys.executable, *map(str, flags), "--epochs", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.repositories["user/model"].commits


def test_a_run_that_cannot_push_trains_to_its_end_and_says_how_to_upload(hub, command, flags, tmp_path):
    hub.fail("POST .*/commit/", 403, times=99)
    done = command(sys.executable, *flags, "--epochs", 2, "--hub-strategy", "best", check=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/best/self_distill.safetensors").exists()
    *_, failure, place, line = done.stdout.splitlines()
    assert re.fullmatch("the model .*not on the Hub: .*403: .*token .*user/model", failure)
    assert f" {tmp_path}/run/best; " in place
    assert "--baseline" in done.stdout
    assert "--no-push-to-hub" in done.stdout

    hub.failures.clear()
    assert line == f"  timm-selfdistill push {tmp_path}/run/best user/model"
    assert command(*line.split()).stdout.startswith(f"{hub.url}/user/model/commit/")
    info = command("timm-selfdistill", "info", "user/model").stdout
    for part in (
        "user/model: test_resnet, 10 classes, 32 x 32 pixels, bottleneck heads",
        "accuracy on images, split test",
        "ensemble",
        "MB  self_distill.safetensors",
    ):
        assert part in info


def test_a_signal_ends_the_last_wait_and_the_table_and_the_command_are_there(hub, hub_programs, flags, tmp_path):
    hub.hold("POST .*/preupload/")
    run = hub_programs.start(*flags, "--epochs", 1, cwd=tmp_path)
    wait_for(lambda: "MB" in run.stdout or run.poll() is not None)
    assert re.search(rf"^uploading {tmp_path}/run/best to user/model, \d\.\d MB$", run.stdout, re.MULTILINE)
    run.terminate()
    done = run.wait()
    assert done.returncode == 3, done.stderr
    assert "ensemble" in done.stdout
    assert "not on the Hub: interrupted" in done.stdout
    assert done.stdout.endswith(f"  timm-selfdistill push {tmp_path}/run/best user/model\n")
    assert not list((tmp_path / "run").glob(".upload-*"))


@pytest.fixture
def uploader(tmp_path, monkeypatch):
    """One whose last wait is interrupted where `interrupt` returns, and whose uploads are calls of `push`."""

    def run(push, interrupt) -> upload.HubUploader:
        def wait(*_):
            interrupt(uploader)
            raise KeyboardInterrupt

        progress = ProgressReporter(1, 0, enabled=False)
        monkeypatch.setattr(progress, "wait", wait)
        monkeypatch.setattr(upload, "create_repository", lambda *_, **__: None)
        monkeypatch.setattr(upload, "push_staged", push)
        small_model().save_pretrained(tmp_path / "best")
        uploader = upload.HubUploader("user/model", tmp_path, private=None, strategy="end", epochs=1)
        uploader.start()
        uploader.push("best", "End of training")
        uploader.finish(progress)
        uploader.thread.join(HANGS)
        assert not uploader.news
        assert not list(tmp_path.glob(".upload-*"))
        return uploader

    return run


def test_an_upload_that_was_stopped_has_no_more_to_say(uploader):
    """Its files go while it still runs."""
    begun = threading.Event()

    def lose_files(staged, *_, **__):
        begun.set()
        wait_for(lambda: not staged.exists())
        raise FileNotFoundError(staged)

    assert uploader(lose_files, lambda _: begun.wait(HANGS)).result.failure.startswith("interrupted")


def test_an_upload_that_ends_as_it_is_stopped_keeps_its_outcome(uploader):
    def fail(*_, **__):
        raise SystemExit("a client that ends its thread")

    def ended(one):
        one.thread.join(HANGS)

    assert uploader(lambda *_, **__: "address", ended).result.url == "address"
    assert uploader(fail, ended).result.failure == "a client that ends its thread"


def test_an_interrupted_run_waits_for_its_upload(hub, hub_programs, flags, tmp_path):
    hub_answers = hub.hold("POST /api/repos/create")
    run = hub_programs.start(*flags, "--epochs", 400, "--hub-strategy", "epoch", cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "run").glob(".upload-*")) or run.poll() is not None)
    run.terminate()
    wait_for(lambda: list((tmp_path / "run/checkpoints").glob("step-*")) or run.poll() is not None)
    assert run.poll() is None
    hub_answers.set()
    done = run.wait()
    assert done.returncode == 143, done.stderr
    assert "on the Hub: " in done.stdout
    assert "--resume" in done.stdout
    assert hub.repositories["user/model"].files("main")["self_distill.safetensors"]


@pytest.mark.slow
def test_pretrained_weights_from_the_hub_are_fine_tuned_and_get_exits(hub, command, flags, tmp_path):
    """The way of a user: a network on the Hub, fine-tuned, pushed, and given exits while frozen, pushed again."""
    command(sys.executable, ROOT / "examples/efficientnet_lite0.py", "lite0")
    command("hf", "upload", "user/lite0", "lite0", ".")
    train, small = [sys.executable, *flags[:3], *flags[7:]], ["--in-chans", 3, "--img-size", 32, "--epochs", 1]
    tuned = command(
        *train,
        *small,
        "--model",
        "hf-hub:user/lite0",
        "--pretrained",
        "--output",
        "tuned",
        "--hub-model-id",
        "user/tuned",
    )
    assert tuned.stderr == ""
    command(
        *train,
        *small,
        "--model",
        "hf-hub:user/tuned",
        "--pretrained",
        "--freeze-backbone",
        "--no-aug",
        "--cache-features",
        "--output",
        "exits",
        "--hub-model-id",
        "user/exits",
    )
    files = {name: hub.repositories[f"user/{name}"].files("main") for name in ("lite0", "tuned", "exits")}
    assert files["exits"]["model.safetensors"] == files["tuned"]["model.safetensors"]
    config = json.loads(files["exits"]["config.json"])
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert len(config["self_distill"]["exits"]) == 3
    assert ModelCard(files["exits"]["README.md"].decode()).data.base_model == "user/tuned"


@pytest.mark.slow
def test_exits_from_the_hub_go_on(hub, command, flags, tmp_path):
    torch.manual_seed(1)
    small_model(exits=["layer3"], head="linear").save_pretrained(tmp_path / "model")
    command("timm-selfdistill", "push", "model", "user/exits")
    done = command(
        sys.executable,
        *flags[:5],
        "--model",
        "hf-hub:user/exits",
        "--pretrained",
        "--epochs",
        1,
        "--lr",
        0,
        "--warmup-epochs",
        0,
        "-b",
        32,
        "-j",
        0,
    )
    assert "loaded the heads of user/exits for the exit at layer3" in done.stdout
    before, after = (load_file(tmp_path / name / "self_distill.safetensors") for name in ("model", "run/best"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
