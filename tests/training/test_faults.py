"""What happens when disks, processes, images, losses or trackers fail: what was saved stays."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.data import Dataset, Subset

from timm_selfdistill import SelfDistillModel, SelfDistillTask, Trainer
from timm_selfdistill.training.loop.update import MOST_SKIPPED, Updater
from timm_selfdistill.training.outputs.metrics import ExitMeter
from timm_selfdistill.training.outputs.saved_models import SavedModels
from timm_selfdistill.training.state.checkpoint import WEIGHTS_FILE, Checkpoints, find_damage, list_checkpoints

from ..conftest import ENVIRONMENT, ROOT, small_model, wait_for
from .test_trainer import RUN_FILES, fit, interrupt_after, make_task, same_weights, settings


@pytest.fixture
def few(fashion_tensors):
    return tuple(Subset(part, range(100)) for part in fashion_tensors)


def at_update(monkeypatch, number: int, call) -> None:
    """Call something before an update of the next run."""
    real = Updater.__call__

    def update(self, group, epoch, update, position):
        if update == number:
            call(self)
        return real(self, group, epoch, update, position)

    monkeypatch.setattr(Updater, "__call__", update)


def test_a_checkpoint_folder_that_cannot_be_written_to_stops_nothing(few, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"

    def replace_by_a_file(_):
        wait_for(lambda: list_checkpoints(folder))  # it is written in the background
        folder.rename(tmp_path / "away")
        folder.touch()

    at_update(monkeypatch, 3, replace_by_a_file)
    with pytest.warns(UserWarning, match=rf"{folder}/step-00000004 .*\(.*Not a directory.*\); .*run continues"):
        result, _ = fit(tmp_path, few)
    assert result.summary
    assert [path.name for path in list_checkpoints(tmp_path / "away")] == ["step-00000002"]


def test_a_model_that_cannot_be_written_in_the_middle_is_written_at_the_end(few, tmp_path, monkeypatch):
    hidden = tmp_path / "hidden"

    def block(_):  # last/ becomes a file that no folder replaces
        shutil.move(tmp_path / "last", hidden)
        (tmp_path / "last").touch()

    real = SavedModels.save_missing

    def unblock(self, *args):
        (tmp_path / "last").unlink()
        return real(self, *args)

    at_update(monkeypatch, 3, block)
    monkeypatch.setattr(SavedModels, "save_missing", unblock)
    with pytest.warns(UserWarning, match=f"{tmp_path}/last .*run continues"):
        _, task = fit(tmp_path, few)
    same_weights(SelfDistillModel.from_pretrained(tmp_path / "last"), task.get_trainable_module(), rtol=0, atol=0)


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=7000k none {folder}
exec {python} -c "
import runpy, sys
from timm_selfdistill.training.state.checkpoint import find_checkpoint
sys.argv[1:] = '--output {folder}/run --data-dir {images} --epochs 3 -j 0 --model test_resnet -b 50'.split()
try:
    runpy.run_path('examples/train.py', run_name='__main__')
finally:
    print(find_checkpoint('latest', '{folder}/run'))
"
"""


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_saved(few_images, tmp_path):
    """On a file system that holds the models and the first checkpoints, but not all of them."""
    namespace = ["unshare", "--map-root-user", "--mount"] if os.getuid() else ["unshare", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    folder = tmp_path / "disk"
    folder.mkdir()
    script = ON_A_SMALL_DISK.format(folder=folder, images=few_images, python=sys.executable)
    done = subprocess.run([*namespace, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert "No space left on device" in done.stderr
    assert "the run continues" in done.stderr
    assert f"{folder}/run/checkpoints/step-" in done.stdout.splitlines()[-1]  # a whole one


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no checksums"])
def test_a_damaged_checkpoint_is_passed_over(damage, few, tmp_path):
    fit(tmp_path, few, epochs=2)
    older, newest = list_checkpoints(tmp_path / "checkpoints")
    path = newest / WEIGHTS_FILE
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "missing":
        path.unlink()
    else:
        (newest / "checksums.json").unlink()
    with pytest.warns(UserWarning, match=f"{newest}.*; skipped"):
        result, _ = fit(tmp_path, few, epochs=3, resume="latest")
    assert len(result.history) == 3
    assert find_damage(newest) is None, "not written again"
    assert older.is_dir()


class Photos(Dataset):
    """Images of which some cannot be read."""

    num_classes = 10

    def __init__(self, data, unreadable):
        self.data, self.unreadable = data, unreadable

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index in self.unreadable:
            raise ValueError(f"image {index} cannot be read")
        return self.data[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read(workers, few, tmp_path):
    data = Photos(few[0], {3, 77}), few[1]
    with pytest.raises(ValueError, match="image (3|77) cannot be read"):
        fit(tmp_path / "a", data, workers=workers, log_interval=1)
    result, _ = fit(tmp_path / "b", data, workers=workers, on_bad_sample="skip")
    assert result.summary
    state = torch.load(list_checkpoints(tmp_path / "b/checkpoints")[-1] / "run.pt", weights_only=True)["state"]
    assert state["replaced_samples"] == 4  # two in each of two epochs


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_validation_image_that_cannot_be_read(workers, few, tmp_path):
    data = few[0], Photos(few[1], {3})
    with pytest.raises(ValueError, match="image 3 cannot be read"):
        fit(tmp_path / "a", data, workers=workers)
    with pytest.warns(UserWarning, match=r"\b1 validation images .*skipped"):
        fit(tmp_path / "b", data, workers=workers, on_bad_sample="skip", validation_batch_size=1)


def test_a_data_set_of_which_nothing_can_be_read(few, tmp_path):
    data = Photos(few[0], set(range(1, 100))), few[1]
    with pytest.raises(ValueError, match=r"image \d+ .*10 others .*: image \d+ cannot be read"):
        fit(tmp_path, data, on_bad_sample="skip")


def poison(updater: Updater) -> None:
    """The next forward pass gives NaN, also in batch norm's statistics."""
    model = updater.task.get_trainable_module()

    def once(_, __, output):
        handle.remove()
        return output * float("nan")

    handle = model.backbone.conv1.register_forward_hook(once)


def test_an_update_that_is_not_finite_is_left_out(few, tmp_path, monkeypatch):
    at_update(monkeypatch, 2, poison)
    with pytest.raises(FloatingPointError, match=r"^the loss .*nan at update 2 .*lower lr, clip_grad"):
        fit(tmp_path / "a", few)
    result, task = fit(tmp_path / "b", few, on_nan="skip", model_ema=True)
    assert result.summary["exits"][-1]["loss"] < 10
    for module in (task.get_trainable_module(), task.get_trainable_module(ema=True)):
        assert all(value.isfinite().all() for value in module.state_dict().values())
    state = torch.load(list_checkpoints(tmp_path / "b/checkpoints")[-1] / "run.pt", weights_only=True)["state"]
    assert state["skipped_updates"] == 1


@pytest.mark.slow
def test_too_many_updates_that_are_not_finite(fashion_tensors, tmp_path, monkeypatch):
    for update in range(3, 3 + MOST_SKIPPED):
        at_update(monkeypatch, update, poison)
    last = 2 + MOST_SKIPPED
    with pytest.raises(FloatingPointError, match=rf"{MOST_SKIPPED} consecutive .*update {last}; .*lower lr or clip"):
        fit(tmp_path, fashion_tensors, on_nan="skip", batch_size=20)


@pytest.mark.slow
def test_skipping_changes_nothing_where_all_is_finite(few, tmp_path):
    _, first = fit(tmp_path / "a", few)
    _, second = fit(tmp_path / "b", few, on_nan="skip")
    same_weights(first.get_trainable_module(), second.get_trainable_module(), rtol=0, atol=0)


def test_a_loading_process_that_dies_ends_the_run_and_the_checkpoint_stays(few, tmp_path, monkeypatch):
    class Deadly(Photos):
        def __getitem__(self, index):
            if index == 3 and (tmp_path / "checkpoints").is_dir() and list_checkpoints(tmp_path / "checkpoints"):
                os.kill(os.getpid(), signal.SIGKILL)
            return self.data[index]

    with pytest.raises(RuntimeError, match="DataLoader worker .* (exited unexpectedly|killed by signal)"):
        fit(tmp_path, (Deadly(few[0], ()), few[1]), workers=1, epochs=8)
    assert list_checkpoints(tmp_path / "checkpoints")
    result, _ = fit(tmp_path, few, epochs=8, resume="latest")
    assert result.summary


def test_a_tracker_that_fails_is_left_alone(few, tmp_path, monkeypatch):
    trainer = Trainer(make_task(), *few, settings(tmp_path, report_to=("tensorboard",), log_interval=1))

    def fail(updater):
        trainer.run.trackers.trackers[0].writer.close()
        trainer.run.trackers.trackers[0].writer = None

    at_update(monkeypatch, 2, fail)
    with pytest.warns(UserWarning, match="tracker tensorboard failed"):
        assert trainer.fit().summary


@pytest.mark.slow
def test_checkpoints_every_so_many_updates_or_seconds(fashion_tensors, tmp_path, monkeypatch):
    fit(tmp_path / "a", fashion_tensors, checkpoint_interval="3", checkpoint_hist=9)
    names = [int(path.name[5:]) for path in list_checkpoints(tmp_path / "a/checkpoints")]
    assert names == [3, 6, 8, 9, 12, 15, 16]
    clock = iter(range(10**6))
    monkeypatch.setattr("timm_selfdistill.training.runtime.progress.time.monotonic", lambda: next(clock))
    fit(tmp_path / "b", fashion_tensors, checkpoint_interval="5s", checkpoint_hist=9)
    names = [int(path.name[5:]) for path in list_checkpoints(tmp_path / "b/checkpoints")]
    assert len(names) > 2
    assert {8, 16} <= set(names)


def test_auto_resume_starts_anew_where_there_is_nothing(few, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExitMeter, "update", stop)
        with pytest.raises(KeyboardInterrupt):  # before its first checkpoint
            fit(tmp_path, few, resume="auto")
    result, _ = fit(tmp_path, few, resume="auto")
    assert len(result.history) == 2
    assert {path.name for path in tmp_path.iterdir()} == RUN_FILES


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_scheduler_may_signal_again_and_again(number, few, tmp_path, monkeypatch):
    real = Checkpoints.write

    def signalled(self, *args):
        signal.raise_signal(number)
        real(self, *args)

    interrupt_after(monkeypatch, 3, number)
    monkeypatch.setattr(Checkpoints, "write", signalled)
    result, _ = fit(tmp_path, few, epochs=3)
    assert result.interrupted_by == number
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000003"


def test_weights_that_are_not_finite_are_no_checkpoint(few, tmp_path, monkeypatch):
    """A finite loss whose gradients are not: the next loss would show it, the checkpoint comes before."""

    def poison_gradients(updater):
        model = updater.task.get_trainable_module()
        handle = model.backbone.fc.weight.register_hook(lambda grad: (handle.remove(), grad * float("nan"))[1])

    at_update(monkeypatch, 3, poison_gradients)
    with pytest.warns(UserWarning, match=rf"{tmp_path}/checkpoints/step-00000003 .*\(.*weights .*not finite\)"):
        with pytest.raises(FloatingPointError, match="step-00000002 is kept"):
            fit(tmp_path, few, checkpoint_interval="1")
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001", "step-00000002"]


def test_a_best_model_that_could_not_be_written_is_not_the_best(few, tmp_path, monkeypatch):
    real, calls = SelfDistillModel.save_pretrained, []

    def full_at_first(self, folder, **how):
        calls.append(folder.name)
        if folder.name == "best" and calls.count("best") == 1:
            raise OSError(28, "No space left on device")
        real(self, folder, **how)

    monkeypatch.setattr(SelfDistillModel, "save_pretrained", full_at_first)
    with pytest.warns(UserWarning, match=rf"{tmp_path}/best .*\(.*No space left.*\); .*run continues"):
        result, _ = fit(tmp_path, few)
    assert calls.count("best") > 1
    saved = json.loads((tmp_path / "best/config.json").read_text())["self_distill"]["metrics"]
    assert saved["epoch"] == 2
    assert result.summary


@pytest.mark.slow
def test_the_schedule_follows_the_epochs_when_batches_change_between_them(few, tmp_path):
    fit(tmp_path, few, epochs=4, batch_size=10, sched="cosine", warmup_epochs=0)
    checkpoint = list_checkpoints(tmp_path / "checkpoints")[0]  # at the end of the second epoch
    with pytest.warns(UserWarning, match="batch_size 50 instead of 10"):
        result, _ = fit(
            tmp_path / "b", few, epochs=4, batch_size=50, sched="cosine", warmup_epochs=0, resume=str(checkpoint)
        )

    def cosine(position: float) -> float:
        return 0.02 * (1 + math.cos(math.pi * position)) / 2

    rates = [row["lr"] for row in result.history]
    assert rates[1:3] == [pytest.approx(cosine(19 / 40)), pytest.approx(cosine(5 / 8))]  # of an epoch's last update


@pytest.mark.slow
def test_torchrun_restarts_only_its_own_run(few, tmp_path, monkeypatch):
    fit(tmp_path / "other", few, epochs=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(FileExistsError, match=f"another run; .*--resume {tmp_path}/other,"):
        fit(tmp_path / "other", few)
    fit(tmp_path / "own", few, epochs=1)
    result, _ = fit(tmp_path / "own", few)
    assert [row["epoch"] for row in result.history] == [1, 2]


def test_too_few_updates_for_a_trace(few, tmp_path):
    with pytest.warns(UserWarning, match="no profile"):
        fit(tmp_path, few, profile=50)


@pytest.mark.slow
def test_a_picture_cut_short_is_no_matter(few, tmp_path, monkeypatch):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    assert fit(tmp_path, few)[0].summary
    with pytest.warns(UserWarning, match="tracker tensorboard failed"):
        assert fit(tmp_path, few, epochs=3, resume="latest", report_to=("tensorboard",))[0].summary


@pytest.mark.slow
def test_a_trace_of_some_updates(fashion_tensors, tmp_path):
    fit(tmp_path, fashion_tensors, profile=2)
    (trace,) = (tmp_path / "profile").iterdir()
    assert "Optimizer.step" in trace.read_text()


def test_settings_that_make_it_another_run_are_refused_and_others_are_listed(few, tmp_path):
    fit(tmp_path, few, epochs=1)
    with pytest.raises(ValueError, match=": seed 7 instead of 42, opt adamw instead of sgd; .*same settings"):
        fit(tmp_path, few, resume="latest", opt="adamw", seed=7)
    with pytest.warns(UserWarning, match=r": epochs 2 instead of 1, lr 0\.1 instead of 0\.02$"):
        fit(tmp_path, few, resume="latest", epochs=2, lr=0.1)


def test_a_checkpoint_of_a_newer_format(few, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("timm_selfdistill.training.state.checkpoint.FORMAT", 2)
        fit(tmp_path, few, epochs=1)
    with pytest.raises(ValueError, match="checkpoints/step-.* format 2, .*timm-selfdistill reads format 1; .*newer"):
        fit(tmp_path, few, resume="latest")


def test_batch_norm_and_one_image(few, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size must be at least 2 .*\(BatchNorm2d\)"):
        fit(tmp_path, few, batch_size=1)
    fit(
        tmp_path,
        tuple(Subset(part, range(4)) for part in few),
        make_task("test_convnext", head="linear"),
        batch_size=1,
        epochs=1,
    )


def test_sync_bn_on_a_cpu_is_refused(few, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="sync_bn .*GPUs .*leave it out"):
        fit(tmp_path, few, sync_bn=True)


@pytest.mark.parametrize(
    ("variable", "value", "changes", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", {"amp": True, "amp_dtype": "bfloat16"}, "mixed_precision fp16, .*bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", {"grad_accum_steps": 2}, r"accumulation_steps 4, .*\b2"),
    ],
)
def test_a_launcher_that_contradicts_the_flags(variable, value, changes, message, few, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"accelerate launch .*{message}; "):
        fit(tmp_path, few, **changes)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launcher_of_another_kind(name, few, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=rf"accelerate launch .*{name}, .*configs/multi_gpu\.yaml"):
        fit(tmp_path, few)


def test_no_warning_in_an_ordinary_run(few, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(tmp_path, few, SelfDistillTask(small_model(in_chans=1)), checkpoint_interval="1")
