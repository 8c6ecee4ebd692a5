"""How long a run is, when it is measured, where it begins, and by what its best model is chosen."""

import csv
import warnings

import pytest
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from timm_selfdistill import TrainConfig, Trainer
from timm_selfdistill.hub import read_metrics
from timm_selfdistill.training.state.checkpoint import list_checkpoints

from . import test_trainer
from .test_trainer import interrupt_after, make_task


def settings(output, **changes) -> TrainConfig:
    """Of runs with 8 updates an epoch on `few`."""
    return test_trainer.settings(output, batch_size=11, **changes)


def fit(output, data, **changes):
    """With 2 updates an epoch."""
    return test_trainer.fit(output, data, batch_size=47, **changes)


def timms_schedule(config: TrainConfig, updates_per_epoch: int):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        schedule, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(config), updates_per_epoch=updates_per_epoch
        )
    return optimizer, schedule, epochs


@pytest.mark.parametrize("on_updates", [True, False])
@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({}, 4),
        ({"cooldown_epochs": 2}, 6),
        ({"warmup_prefix": True, "warmup_epochs": 3.0}, 7),
        ({"lr_cycle_limit": 3, "lr_cycle_mul": 2.0}, 28),
        ({"sched": "tanh", "cooldown_epochs": 1}, 5),
        ({"sched": "step", "decay_epochs": 2.0, "warmup_prefix": True, "warmup_epochs": 2.0}, 6),
        ({"sched": "wsd", "decay_epochs": 0.5}, 4),
        ({"sched": "rsqrt", "warmup_epochs": 1.0}, 4),
        ({"sched": "constant"}, 4),
        ({"sched": "poly", "decay_rate": 0.9}, 4),
        ({"sched": "none"}, 4),
    ],
)
def test_the_length_and_learning_rates_of_a_run(changes, epochs, on_updates, few, tmp_path):
    """As timm's."""
    config = settings(tmp_path, epochs=4, lr=0.4, min_lr=0.01, sched_on_updates=on_updates, **changes)
    trainer = Trainer(make_task(), *few, config)
    assert trainer.updates_per_epoch == 8
    reference, schedule, expected = timms_schedule(config, 8)
    assert trainer.epochs == expected == epochs
    for position in range(8 * epochs):
        if schedule is not None and on_updates:
            schedule.step_update(position)
        elif schedule is not None and position and position % 8 == 0:
            schedule.step(position // 8)
        trainer.update.set_schedule(position)
        lr = trainer.update.optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(reference.param_groups[0]["lr"]), position


def test_a_run_with_a_cooldown_is_longer(few, tmp_path):
    result, _ = fit(tmp_path / "run", few, epochs=1, cooldown_epochs=1, min_lr=0.003)
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert result.history[-1]["lr"] == pytest.approx(0.003)
    assert result.summary["epochs"] == 2


@pytest.mark.slow
def test_the_plateau_schedule_and_its_resumption(few, tmp_path, monkeypatch):
    """Stopped and resumed, too, it goes by the metrics of all epochs."""
    changes = {
        "sched": "plateau",
        "epochs": 5,
        "lr": 1.0,
        "patience_epochs": 0,
        "decay_rate": 0.5,
        "warmup_epochs": 1.0,
        "warmup_lr": 0.5,
    }
    whole, _ = fit(tmp_path / "whole", few, **changes)
    reference, schedule, _ = timms_schedule(settings(tmp_path, **changes, sched_on_updates=False), 8)
    for row in whole.history:
        assert row["lr"] == reference.param_groups[0]["lr"]
        schedule.step(row["epoch"], row["top1_exit_3"])
    assert whole.history[-1]["lr"] < 1
    interrupt_after(monkeypatch, 7)
    fit(tmp_path / "run", few, **changes)
    monkeypatch.undo()
    resumed, _ = fit(tmp_path / "run", few, resume="latest", **changes)
    assert [row["lr"] for row in resumed.history] == [row["lr"] for row in whole.history]
    interrupt_after(monkeypatch, 1)
    fit(tmp_path / "early", few, **changes)
    monkeypatch.undo()
    early, _ = fit(tmp_path / "early", few, resume="latest", **changes)
    assert [row["lr"] for row in early.history] == [row["lr"] for row in whole.history]


def test_measured_every_second_epoch(few, tmp_path):
    result, _ = fit(tmp_path / "run", few, epochs=5, val_interval=2)
    assert [row["epoch"] for row in result.history if "top1_exit_0" in row] == [2, 4, 5]
    assert all(row["train_loss"] > 0 for row in result.history)
    with (tmp_path / "run/history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["top1_exit_3"]) for row in rows] == [False, True, False, True, True]
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == [
        "step-00000004",
        "step-00000008",
        "step-00000010",
    ]
    assert read_metrics(tmp_path / "run/best")["epoch"] in (2, 4, 5)
    assert (tmp_path / "run/curves.png").is_file()


@pytest.mark.parametrize(("name", "choose"), [("top5", max), ("loss", min)])
def test_the_metric_of_the_best_model(name, choose, few, tmp_path):
    result, _ = fit(tmp_path / "run", few, epochs=4, lr=0.3, warmup_epochs=0.0, eval_metric=name)
    values = [row[f"{name}_exit_3"] for row in result.history]
    assert read_metrics(tmp_path / "run/best")["epoch"] == 1 + values.index(choose(values))


def test_another_metric_after_a_resumption(few, tmp_path, monkeypatch):
    """The best model so far is compared by the new one."""
    changes = {"epochs": 4, "lr": 0.3, "warmup_epochs": 0.0}
    interrupt_after(monkeypatch, 5)
    fit(tmp_path / "run", few, **changes)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="eval_metric top1 instead of loss|eval_metric loss instead of top1"):
        resumed, _ = fit(tmp_path / "run", few, resume="latest", eval_metric="loss", **changes)
    losses = {row["epoch"]: row["loss_exit_3"] for row in resumed.history}
    before = max(resumed.history[:2], key=lambda row: row["top1_exit_3"])["epoch"]
    best = min([before, 3, 4], key=lambda epoch: (losses[epoch], epoch))
    assert read_metrics(tmp_path / "run/best")["epoch"] == best


def test_a_run_that_begins_later(few, tmp_path):
    result, _ = fit(tmp_path / "run", few, epochs=3, start_epoch=2)
    whole, _ = fit(tmp_path / "whole", few, epochs=3)
    assert [row["epoch"] for row in result.history] == [3]
    assert result.history[0]["lr"] == whole.history[2]["lr"]
    with pytest.raises(ValueError, match="start_epoch must be less than the run's 3 epochs, got 3"):
        Trainer(make_task(), *few, settings(tmp_path / "other", epochs=3, start_epoch=3))


def test_resuming_without_the_state_of_the_optimizer(few, tmp_path):
    """Another optimizer goes on from the weights."""
    fit(tmp_path / "run", few, epochs=1)
    changes = {"epochs": 2, "resume": "latest", "opt": "adamw"}
    with pytest.raises(ValueError, match="from a run with other settings, .*opt adamw instead of sgd"):
        fit(tmp_path / "run", few, **changes)
    with pytest.warns(UserWarning, match="resumed with different settings: .*no_resume_opt True instead of"):
        result, _ = fit(tmp_path / "run", few, no_resume_opt=True, **changes)
    assert [row["epoch"] for row in result.history] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sched": "step", "cooldown_epochs": 2},
            "cooldown_epochs works with the schedules cosine, tanh, poly, but sched",
        ),
        ({"sched": "plateau", "warmup_prefix": True}, "warmup_prefix needs a schedule of known length"),
        ({"no_resume_opt": True}, "no_resume_opt has no effect without resume; set resume, too"),
        ({"val_interval": 0}, "val_interval must be at least 1"),
        ({"eval_metric": "f1"}, "eval_metric must be one of top1, top5, loss, got 'f1'"),
        ({"aug_repeats": 0.5}, "aug_repeats must be 0 .off. or at least 1"),
        ({"start_epoch": -1}, "start_epoch must be a number >= 0"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_a_schedule_that_does_not_fit_into_its_epochs(few, tmp_path):
    with pytest.raises(ValueError, match="wsd schedule requires 0 < decay_epochs <= epochs"):
        Trainer(make_task(), *few, settings(tmp_path, sched="wsd", decay_epochs=30.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:99", "device cuda:99 is not available here"),
        ("xla", "device xla is not available here"),
        ("gpu", "device must be cpu, cuda, cuda:1, ..., got 'gpu'"),
    ],
)
def test_devices_that_are_not_there(name, message, few, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(make_task(), *few, settings(tmp_path, device=name))


def test_the_cpu_on_demand(few, tmp_path):
    assert Trainer(make_task(), *few, settings(tmp_path, device="cpu")).accelerator.device.type == "cpu"
