import csv
import json
import signal
import time
from datetime import datetime
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import timm
import torch
import yaml
from timm.task import ClassificationTask, LogitDistillationTask
from torch import nn
from torch.utils.data import Subset, TensorDataset

from timm_selfdistill import (
    SelfDistillLoss,
    SelfDistillModel,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    wrap_self_distill,
)
from timm_selfdistill.training.loop.update import Updater
from timm_selfdistill.training.state.checkpoint import list_checkpoints

from ..conftest import small_backbone, small_model

RUN_FILES = {"config.yaml", "history.csv", "summary.json", "curves.png", "exits.png", "checkpoints", "best", "last"}


def make_task(name: str = "test_resnet", **kwargs) -> SelfDistillTask:
    torch.manual_seed(0)
    return SelfDistillTask(small_model(name, in_chans=1, **kwargs))


def settings(output, **changes) -> TrainConfig:
    fast = {"epochs": 2, "batch_size": 50, "workers": 0, "lr": 0.02, "warmup_epochs": 0.5}
    return TrainConfig(output=str(output), **{**fast, **changes})


def fit(output, data, task=None, **changes):
    task = task or make_task()
    return Trainer(task, *data, settings(output, **changes)).fit(), task


def interrupt_after(monkeypatch, updates: int, number: signal.Signals = signal.SIGINT) -> None:
    real = Updater.__call__

    def update(self, group, epoch, number_of_update, position):
        losses = real(self, group, epoch, number_of_update, position)
        if number_of_update == updates:
            signal.raise_signal(number)
        return losses

    monkeypatch.setattr(Updater, "__call__", update)


def same_weights(first: nn.Module, second: nn.Module, **tolerance) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda message, name=name: f"{name}: {message}", **tolerance)


def test_a_run_learns_and_leaves_its_directory(fashion_tensors, tmp_path):
    result, _ = fit(tmp_path, fashion_tensors, epochs=6)
    assert {path.name for path in tmp_path.iterdir()} == RUN_FILES
    assert result.output == tmp_path
    assert result.interrupted_by is None
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 3

    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    assert float(rows[0]["train_loss"]) == pytest.approx(
        sum(
            weight * float(rows[0][f"train_{name}_loss"])
            for name, weight in (("label", 1), ("distill", 0.3), ("hint", 0.03))
        ),
        rel=1e-5,
    )

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == result.summary
    assert [row["exit"] for row in summary["exits"]] == [0, 1, 2, 3, "ensemble"]
    assert set(summary["exits"][0]) == {"exit", "top1", "top5", "loss", "module", "params", "macs", "share", "speedup"}
    assert summary["exits"][3]["top1"] > 30  # chance is 10 %
    assert summary["exits"][3]["top1"] == float(rows[-1]["top1_exit_3"])
    assert summary["exits"][3]["share"] == 1
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["batch_size"] == 50


@pytest.mark.parametrize(("seconds", "times"), [(1, 1), (121, 4)])
def test_pictures_are_drawn_at_the_end_and_every_two_minutes_at_most(
    seconds, times, fashion_tensors, tmp_path, monkeypatch
):
    """Three epochs of so many seconds, by a clock of the test's own."""
    now, drawn = [0.0], []
    monkeypatch.setattr(
        "timm_selfdistill.training.runtime.progress.time",
        SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter),
    )
    monkeypatch.setattr(
        "timm_selfdistill.training.outputs.run_directory.plot_curves",
        lambda *_: drawn.append([(tmp_path / name / "exits.png").exists() for name in ("best", "last")]),
    )
    measure = Trainer._measure
    monkeypatch.setattr(Trainer, "_measure", lambda self: (now.append(now.pop() + seconds), measure(self))[1])
    fit(tmp_path, tuple(Subset(part, range(100)) for part in fashion_tensors), epochs=3)
    assert len(drawn) == times
    for name in ("best", "last"):
        assert (tmp_path / name / "exits.png").exists()
        assert "](exits.png)" in (tmp_path / name / "README.md").read_text()


def test_the_saved_models_are_the_evaluated_ones(fashion_tensors, tmp_path):
    result, task = fit(tmp_path, fashion_tensors)
    loaded = SelfDistillModel.from_pretrained(tmp_path / "last")
    same_weights(loaded, task.get_eval_model(), rtol=0, atol=0)
    x = torch.stack([fashion_tensors[1][i][0] for i in range(100)])
    y = torch.tensor([fashion_tensors[1][i][1] for i in range(100)])
    plain = timm.create_model(f"local-dir:{tmp_path / 'last'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(x), loaded(x))
        for row in result.summary["exits"]:
            top1 = 100 * (loaded.predict(x, row["exit"]).argmax(1) == y).double().mean().item()
            assert top1 == pytest.approx(row["top1"])
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    assert config["self_distill"]["metrics"]["epoch"] == 2
    best = json.loads((tmp_path / "best" / "config.json").read_text())["self_distill"]["metrics"]["exits"]
    assert best[3]["top1"] == max(row["top1_exit_3"] for row in result.history)


@pytest.mark.parametrize(
    "task",
    [
        lambda: ClassificationTask(small_backbone(in_chans=1), nn.CrossEntropyLoss(), verbose=False),
        lambda: LogitDistillationTask(
            small_backbone(in_chans=1), small_backbone(in_chans=1), criterion=nn.CrossEntropyLoss(), verbose=False
        ),
    ],
    ids=["plain", "knowledge distillation"],
)
def test_any_timm_task_trains_in_the_same_loop(task, fashion_tensors, tmp_path):
    result, task = fit(tmp_path, fashion_tensors, task(), epochs=1)
    (row,) = result.summary["exits"]
    assert (row["exit"], row["share"]) == (0, 1)
    saved = timm.create_model(f"local-dir:{tmp_path / 'last'}", pretrained=True)
    same_weights(saved, task.get_eval_model(), rtol=0, atol=0)


def test_a_run_stopped_in_the_middle_goes_on_as_if_nothing_had_happened(fashion_tensors, tmp_path, monkeypatch):
    def task_with_dropout():
        task = make_task()
        task.get_trainable_module().backbone.drop_rate = 0.3
        return task

    changes = {
        "mixup": 0.2,
        "smoothing": 0.1,
        "model_ema": True,
        "model_ema_decay": 0.9,
        "grad_accum_steps": 2,
        "clip_grad": 1.0,
        "opt": "adamw",
        "lr": 1e-3,
        "batch_size": 20,
    }
    undisturbed, task = fit(tmp_path / "a", fashion_tensors, task_with_dropout(), **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        stopped, _ = fit(tmp_path / "b", fashion_tensors, task_with_dropout(), **changes)
    assert stopped.interrupted_by == signal.SIGINT
    assert stopped.summary is None
    checkpoints = list_checkpoints(tmp_path / "b" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000010", "step-00000013"]

    resumed, again = fit(tmp_path / "b", fashion_tensors, task_with_dropout(), resume="latest", **changes)
    same_weights(task.get_trainable_module(), again.get_trainable_module(), rtol=0, atol=0)
    same_weights(task.get_trainable_module(ema=True), again.get_trainable_module(ema=True), rtol=0, atol=0)
    assert resumed.history == undisturbed.history


@pytest.mark.parametrize(
    "resume",
    ["", *(pytest.param(name, marks=pytest.mark.slow) for name in ("checkpoints", "checkpoints/step-00000008"))],
)
def test_resume_from_a_run_directory_or_one_checkpoint(resume, fashion_tensors, tmp_path):
    fit(tmp_path, fashion_tensors)
    task = make_task()
    trainer = Trainer(task, *fashion_tensors, settings("", resume=str(tmp_path / resume), epochs=3))
    assert trainer.output == tmp_path
    result = trainer.fit()
    assert [row["epoch"] for row in result.history] == ([1, 2, 3])


def test_sigterm_ends_politely_too(fashion_tensors, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2, signal.SIGTERM)
    result, _ = fit(tmp_path, fashion_tensors)
    assert result.interrupted_by == signal.SIGTERM
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_accumulated_gradients_are_those_of_the_large_batch(fashion_tensors, tmp_path):
    tasks = [make_task("test_convnext", head="linear") for _ in range(2)]  # no batch norm
    data = tuple(Subset(part, range(80)) for part in fashion_tensors)
    sizes = [{"batch_size": 40}, {"batch_size": 10, "grad_accum_steps": 4}]
    for task, size in zip(tasks, sizes):
        fit(tmp_path / str(size["batch_size"]), data, task, epochs=1, **size)
    same_weights(tasks[0].get_trainable_module(), tasks[1].get_trainable_module(), rtol=1e-4, atol=1e-5)


def test_bf16_trains_in_bf16_and_keeps_float32_weights(fashion_tensors, tmp_path):
    seen = []
    task = make_task()
    task.get_trainable_module().backbone.layer4.register_forward_hook(lambda _, x, y: seen.append(y.dtype))
    result, _ = fit(tmp_path, fashion_tensors, task, epochs=1, amp=True, amp_dtype="bfloat16")
    assert torch.bfloat16 in seen
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    assert result.history[0]["train_loss"] > 0


def test_the_moving_average_is_what_is_evaluated_and_saved(fashion_tensors, tmp_path):
    _, task = fit(tmp_path, fashion_tensors, epochs=1, model_ema=True, model_ema_decay=0.5)
    average = task.get_trainable_module(ema=True).module
    loaded = SelfDistillModel.from_pretrained(tmp_path / "last")
    same_weights(loaded, average, rtol=0, atol=0)
    assert not torch.equal(loaded.backbone.fc.weight, task.get_trainable_module().backbone.fc.weight)


def test_a_frozen_backbone_is_saved_as_it_was(fashion_tensors, tmp_path):
    backbone = small_backbone(in_chans=1)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    fit(tmp_path, fashion_tensors, SelfDistillTask(wrap_self_distill(backbone, freeze_backbone=True)))
    saved = SelfDistillModel.from_pretrained(tmp_path / "last").backbone.state_dict()
    assert all(torch.equal(saved[key], value) for key, value in before.items())


def test_trackers_get_losses_and_metrics(fashion_tensors, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, fashion_tensors, report_to=("tensorboard",), log_interval=4)
    events = EventAccumulator(str(tmp_path / "timm-selfdistill")).Reload()
    assert {"train_loss", "lr", "train_distill_loss", "top1_exit_0", "top1_ensemble"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("top1_exit_3")] == [8, 16]


def test_schedules_warm_up_and_step_every_update(fashion_tensors, tmp_path):
    trainer = Trainer(make_task(), *fashion_tensors, settings(tmp_path, epochs=1, sched="cosine", lr=0.1))
    rates = []
    update = trainer.update
    step = update.optimizer.step
    update.optimizer.step = lambda: (rates.append(update.optimizer.param_groups[0]["lr"]), step())
    trainer.fit()
    assert rates[0] == pytest.approx(1e-5)
    assert rates[:4] == sorted(rates[:4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) > 0.05


@pytest.mark.parametrize(
    "schedule",
    ["cosine", "step", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tanh", "multistep", "poly", "none"))],
)
def test_every_schedule_runs(schedule, fashion_tensors, tmp_path):
    data = tuple(Subset(part, range(100)) for part in fashion_tensors)
    fit(tmp_path, data, sched=schedule, decay_epochs=1, decay_milestones=(1,))


@pytest.mark.parametrize("bad", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stays(bad, fashion_tensors, tmp_path):
    class Breaking(SelfDistillLoss):
        calls = 0

        def terms(self, output, target=None):
            self.calls += 1
            terms = super().terms(output, target)
            return {**terms, "loss": terms["loss"] * (bad if self.calls == 11 else 1)}

    task = SelfDistillTask(small_model(in_chans=1), Breaking())
    checkpoint = tmp_path / "checkpoints" / "step-00000008"
    with pytest.raises(FloatingPointError, match=rf"^the loss .*{bad} .* 11 \(epoch 2\); {checkpoint} is kept; .* lr"):
        fit(tmp_path, fashion_tensors, task)
    assert list_checkpoints(tmp_path / "checkpoints") == [checkpoint]
    assert {"curves.png", "history.csv"} < {path.name for path in tmp_path.iterdir()}
    assert all(value.isfinite().all() for value in SelfDistillModel.from_pretrained(tmp_path / "last").parameters())


def test_fp16_on_a_cpu_is_refused(fashion_tensors, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="fp16 .*GPU .*amp_dtype bfloat16"):
        fit(tmp_path, fashion_tensors, amp=True)


def test_model_and_data_of_other_classes(fashion_tensors, tmp_path):
    with pytest.raises(ValueError, match="7 classes, .*10; .*num_classes=10"):
        fit(tmp_path, fashion_tensors, make_task(num_classes=7))


def test_what_is_no_task_is_refused(fashion_tensors, tmp_path):
    with pytest.raises(TypeError, match=r"timm\.task\.TrainingTask .*got SelfDistillModel"):
        fit(tmp_path, fashion_tensors, small_model())


def test_labels_out_of_range_are_refused(tmp_path):
    data = TensorDataset(torch.randn(8, 1, 32, 32), torch.tensor([0, 1, 2, 10] * 2))
    with pytest.raises(ValueError, match="class indices .* 0 to 9, .* class index 10"):
        fit(tmp_path, (data, data), batch_size=8)


def test_a_model_that_could_not_be_saved_is_refused_before_the_first_step(fashion_tensors, tmp_path):
    backbone = small_backbone(in_chans=1)
    backbone.act1 = nn.GELU()
    backbone.bn1 = nn.Identity()
    task = SelfDistillTask(wrap_self_distill(backbone))
    trainer = Trainer(task, *fashion_tensors, settings(tmp_path))
    with pytest.raises(ValueError, match=r"rebuild .*wrap_self_distill\(model, model_args="):
        trainer.fit()
    assert trainer.state.updates == 0


def test_an_output_of_another_run_is_refused(fashion_tensors, tmp_path):
    data = tuple(Subset(part, range(100)) for part in fashion_tensors)
    fit(tmp_path / "a", data, epochs=1)
    with pytest.raises(FileExistsError, match=f"{tmp_path}/a .*another run; .*--resume {tmp_path}/a, .*another output"):
        fit(tmp_path / "a", data)
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    with pytest.raises(FileExistsError, match=f"{tmp_path} .*another run; remove it, .*another output"):
        fit(tmp_path, data)


def test_an_output_that_cannot_be_written_is_refused(fashion_tensors, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"{tmp_path}/file/run \(Not a directory\); .*another output"):
        fit(tmp_path / "file" / "run", fashion_tensors)


def test_nothing_to_resume(fashion_tensors, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} .*checkpoints/"):
        fit(tmp_path, fashion_tensors, resume="latest")
    with pytest.raises(FileNotFoundError, match="resume='latest' .*as output"):
        fit("", fashion_tensors, resume="latest")
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"exits": [1]}, "trainable_module.heads.1.bottleneck.0.weight"),
        ({"num_classes": 12}, "trainable_module.backbone.fc.bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, first, fashion_tensors, tmp_path):
    data = tuple(Subset(part, range(100)) for part in fashion_tensors)
    fit(tmp_path, data, epochs=1)
    before = {name: (tmp_path / name).read_bytes() for name in ("last/model.safetensors", "config.yaml")}
    with pytest.raises(ValueError, match=rf"a different model: \d+ tensors .*'{first}' first; .*model_ema"):
        fit(tmp_path, data, make_task(**change), epochs=2, resume="latest")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("change", [{"batch_size": 16}, {"batch_size": 25}])
def test_an_epoch_begun_with_other_batches_is_not_gone_on_with(change, fashion_tensors, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        fit(tmp_path, fashion_tensors)
    message = f"400 images in batches of 50 .*400 images in batches of {change['batch_size']}; .*with the same"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, fashion_tensors, resume="latest", **change)


@pytest.mark.slow
def test_another_batch_size_at_the_start_of_an_epoch_is_fine(fashion_tensors, tmp_path):
    fit(tmp_path, fashion_tensors, epochs=1)
    result, _ = fit(tmp_path, fashion_tensors, epochs=2, batch_size=16, resume="latest")
    assert len(result.history) == 2


def test_resuming_an_older_checkpoint_sets_the_newer_ones_aside(fashion_tensors, tmp_path, monkeypatch):
    fit(tmp_path, fashion_tensors, epochs=3)
    interrupt_after(monkeypatch, 10)
    fit("", fashion_tensors, epochs=3, resume=str(tmp_path / "checkpoints" / "step-00000008"))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["left-step-00000016", "left-step-00000024", "step-00000008", "step-00000010"]


@pytest.mark.slow
def test_checkpoints_that_were_set_aside_go_when_the_run_overtakes_them(fashion_tensors, tmp_path, monkeypatch):
    fit(tmp_path, fashion_tensors, epochs=3)
    fit("", fashion_tensors, epochs=2, resume=str(tmp_path / "checkpoints" / "step-00000008"))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["left-step-00000024", "step-00000008", "step-00000016"]


@pytest.mark.parametrize("epochs", [pytest.param(5, marks=pytest.mark.slow), 6])
@pytest.mark.slow
def test_the_best_model_goes_along_to_another_directory(epochs, fashion_tensors, tmp_path):
    """With an lr that spoils the model after its fourth epoch; the run is over, or goes on."""
    fit(tmp_path / "a", fashion_tensors, epochs=4)
    fit(tmp_path / "a", fashion_tensors, epochs=5, resume="latest", lr=5.0)
    result, _ = fit(tmp_path / "b", fashion_tensors, epochs=epochs, resume=str(tmp_path / "a"), lr=5.0)
    best = json.loads((tmp_path / "b/best/config.json").read_text())["self_distill"]["metrics"]
    expected = max(result.history, key=lambda row: row["top1_exit_3"])
    assert (best["epoch"], best["exits"][-2]["top1"]) == (expected["epoch"], expected["top1_exit_3"])
    assert expected["epoch"] < 5
    assert SelfDistillModel.from_pretrained(tmp_path / "b/best").exits == make_task().get_eval_model().exits


def test_a_second_run_in_the_process_has_its_own_precision(fashion_tensors, tmp_path):
    data = tuple(Subset(part, range(100)) for part in fashion_tensors)
    for name, amp in (("a", True), ("b", False), ("c", True)):
        trainer = Trainer(make_task(), *data, settings(tmp_path / name, amp=amp, amp_dtype="bfloat16"))
        assert trainer.accelerator.mixed_precision == ("bf16" if amp else "no")


def test_weights_that_exploded_in_the_last_update_are_not_saved(fashion_tensors, tmp_path):
    data = tuple(Subset(part, range(50)) for part in fashion_tensors)
    with pytest.raises(FloatingPointError, match=r"validation loss .*nan at update 1\b"):
        fit(tmp_path, data, lr=1e30, warmup_epochs=0)
    assert not list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("part", ["training", "validation"])
def test_no_images(part, fashion_tensors, tmp_path):
    sizes = {"training": 100, "validation": 100, part: 0}
    with pytest.raises(ValueError, match=f"no {part} images"):
        fit(tmp_path, tuple(Subset(data, range(size)) for data, size in zip(fashion_tensors, sizes.values())))


def test_a_damaged_checkpoint_is_named(fashion_tensors, tmp_path):
    data = tuple(Subset(part, range(100)) for part in fashion_tensors)
    fit(tmp_path, data, epochs=1)
    (path,) = (tmp_path / "checkpoints").glob("*/model.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f" 1 checkpoints of {tmp_path} .*damaged; .*new run"):
        fit(tmp_path, data, epochs=2, resume="latest")


def test_too_few_images(fashion_tensors, tmp_path):
    with pytest.raises(ValueError, match="400 training images .*batch of 401; .*batch_size"):
        fit(tmp_path, fashion_tensors, batch_size=401)


def test_an_unknown_tracker(fashion_tensors, tmp_path):
    with pytest.raises(ValueError, match="tracker foo; .*tensorboard"):
        fit(tmp_path, fashion_tensors, report_to=("foo",))


def test_resuming_into_a_new_output_leaves_a_whole_run_directory_there(fashion_tensors, tmp_path):
    data = tuple(Subset(part, range(100)) for part in fashion_tensors)
    fit(tmp_path / "a", data, epochs=1)
    fit(tmp_path / "b", data, epochs=2, resume=str(tmp_path / "a"))
    assert {path.name for path in (tmp_path / "b").iterdir()} == RUN_FILES
    assert SelfDistillModel.from_pretrained(tmp_path / "b" / "best").exits == ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.slow
def test_a_finished_run_resumed_into_a_new_output_saves_its_models_there(fashion_tensors, tmp_path):
    data = tuple(Subset(part, range(100)) for part in fashion_tensors)
    _, task = fit(tmp_path / "a", data, epochs=1)
    fit(tmp_path / "b", data, epochs=1, resume=str(tmp_path / "a"))
    for name in ("best", "last"):
        same_weights(SelfDistillModel.from_pretrained(tmp_path / "b" / name), task.get_trainable_module())


def test_only_timm_models_can_be_pushed(fashion_tensors, tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    with pytest.raises(ValueError, match="push_to_hub .*timm .*got Sequential"):
        fit(tmp_path / "run", fashion_tensors, ClassificationTask(network, nn.CrossEntropyLoss()), push_to_hub=True)
    assert not (tmp_path / "run").exists()


def test_a_constructor_writes_nothing(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = make_task()
    for _ in range(2):
        trainer = Trainer(task, *few, settings("run", epochs=1))
    assert list(tmp_path.iterdir()) == []
    result = trainer.fit()
    again, _ = fit("again", few, epochs=1)
    assert result.history == again.history
    with pytest.raises(FileExistsError, match="run holds another run"):
        Trainer(task, *few, settings("run"))


@pytest.mark.slow
def test_two_runs_begun_in_one_second(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "timm_selfdistill.training.outputs.run_directory.datetime", SimpleNamespace(now=lambda: datetime(2020, 1, 2))
    )
    trainers = [Trainer(make_task(), *few, settings("", epochs=1)) for _ in range(2)]
    assert [trainer.output for trainer in trainers] == [None, None]
    outputs = [str(trainer.fit().output) for trainer in trainers]
    assert outputs == [f"output/train/20200102-000000{end}" for end in ("", "-2")]


def test_a_run_that_fails_before_its_first_checkpoint_leaves_its_directory_to_the_next(few, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "fix_gradient_order", Mock(side_effect=ValueError("a setting")))
        with pytest.raises(ValueError, match="a setting"):
            fit(tmp_path / "run", few)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    fit(tmp_path / "run", few, epochs=1)


class GrowingTask(ClassificationTask):
    """With a loss in its first epoch, and another from the second on."""

    calls = 0

    def forward(self, x, y):
        self.calls += 1
        result = super().forward(x, y)
        return {**result, "early_loss" if self.calls < 3 else "late_loss": torch.tensor(float(self.calls))}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_model_without_num_classes_and_losses_that_come_and_go(smoothing, few, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10))
    fit(tmp_path, few, GrowingTask(model, nn.CrossEntropyLoss(), verbose=False), batch_size=40, smoothing=smoothing)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [row["train_early_loss"] for row in rows] == ["1.5", ""]
    assert [row["train_late_loss"] for row in rows] == ["", "3.5"]


def test_a_model_without_num_classes_that_gives_no_logits(few, tmp_path):
    task = ClassificationTask(nn.Sequential(nn.Conv2d(1, 10, 3)), nn.CrossEntropyLoss(), verbose=False)
    with pytest.raises(ValueError, match=r"Sequential must return logits \(B, classes\) .*got \(1, 10, 30, 30\)"):
        fit(tmp_path, few, task)


def test_the_lr_in_the_history_is_that_of_the_last_update(few, tmp_path, monkeypatch):
    used, real = [], Updater.__call__

    def update(self, *args):
        used.append(self.optimizer.param_groups[-1]["lr"])
        return real(self, *args)

    monkeypatch.setattr(Updater, "__call__", update)
    result, _ = fit(tmp_path / "a", few, epochs=2, batch_size=30)
    assert len(used) == 6
    assert [row["lr"] for row in result.history] == [used[2], used[5]]
    scaled, _ = fit(tmp_path / "b", few, epochs=2, batch_size=30, layer_decay=0.5, head_lr_scale=10.0)
    assert [row["lr"] for row in scaled.history] == [row["lr"] for row in result.history]


@pytest.mark.parametrize("end", ["ended", "error", "signal"])
def test_loading_processes_end_with_the_run(end, few, tmp_path, monkeypatch):
    if end == "signal":
        interrupt_after(monkeypatch, 1)
    if end == "error":
        monkeypatch.setattr(Trainer, "_finish_epoch", Mock(side_effect=ValueError("stop")))
    before = set(psutil.Process().children(recursive=True))
    trainer = Trainer(make_task(), *few, settings(tmp_path, epochs=1, workers=2))
    error = None
    try:
        trainer.fit()
    except ValueError as caught:
        error = caught  # and with it all frames
    assert (error is not None) == (end == "error")
    left = set(psutil.Process().children(recursive=True)) - before
    assert [
        process
        for process in left
        if process.status() != psutil.STATUS_ZOMBIE and "tracker" not in " ".join(process.cmdline())
    ] == []
    assert trainer.evaluate()  # begins new ones
    trainer.val_batches.end_workers()
