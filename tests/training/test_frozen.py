"""Exits on a backbone that must not change: what stays, what learns, and from whom."""

import copy
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import Subset

from timm_selfdistill import (
    SelfDistillModel,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    wrap_self_distill,
)
from timm_selfdistill.hub import read_metrics
from timm_selfdistill.task import ExitHeads
from timm_selfdistill.training.loop.frozen import FOLDER
from timm_selfdistill.training.outputs.metrics import ExitMetrics, deciding_metric
from timm_selfdistill.training.state.checkpoint import Checkpoints, read_checkpoint
from timm_selfdistill.training.state.snapshot import Snapshot

from ..conftest import EMBEDDED, ROOT, run_python, small_backbone, small_model
from .frozen_runs import equal, fit, frozen_model


@pytest.mark.parametrize(
    "name", ["test_resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("test_vit", "test_efficientnet"))]
)
@pytest.mark.parametrize("settings", [{}, {"model_ema": True, "on_nan": "skip", "opt": "adamw", "lr": 1e-3}])
def test_no_bit_of_the_backbone_changes(name, settings, few, tmp_path):
    size = {"img_size": 32} if name == "test_vit" else {}
    backbone = small_backbone(name, in_chans=1, drop_rate=0.5, **size)
    model = wrap_self_distill(backbone, freeze_backbone=True, model_args=size)
    before = copy.deepcopy(model.state_dict())
    run = fit(model, few, tmp_path, **settings)
    after = model.state_dict()
    for key, value in before.items():
        if key.startswith("backbone."):
            assert torch.equal(after[key], value), key
    assert not all(torch.equal(after[key], value) for key, value in before.items())
    model.train()
    assert not any(part.training for part in model.backbone.modules())
    assert all(head.training for head in model.heads.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.backbone.parameters())
    saved = load_file(run.output / "last/model.safetensors")
    assert equal(saved, {key.removeprefix("backbone."): value for key, value in before.items() if "backbone." in key})


def test_the_backbone_leaves_no_graph():
    model, x = frozen_model().train(), torch.randn(4, 1, 32, 32)

    def saved_by(call) -> list[int]:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            call()
        return saved

    maps = model.forward_backbone(x)
    assert not any(part.requires_grad for part in [*maps.maps, maps.logits])
    assert len(saved_by(lambda: model(x))) == len(saved_by(lambda: ExitHeads(model)(maps))) > 0
    assert saved_by(lambda: model.forward_backbone(x)) == []


def test_what_the_backbone_gave_says_the_same_as_the_images():
    model, x = frozen_model().eval(), torch.randn(4, 1, 32, 32)
    direct, later = model.forward_exits(x), ExitHeads(model)(model.forward_backbone(x))
    for one, other in zip([*direct.logits, *direct.features], [*later.logits, *later.features], strict=True):
        assert torch.equal(one, other)


def test_optimizer_average_and_checkpoints_hold_the_heads_only(few, tmp_path):
    model = frozen_model()
    run = fit(model, few, tmp_path, model_ema=True, weight_decay=0.0)
    in_optimizer = {id(param) for group in run.update.optimizer.param_groups for param in group["params"]}
    assert in_optimizer == set(map(id, model.heads.parameters()))
    weights = load_file(run.run.checkpoints.newest / "model.safetensors")
    names = model.heads.state_dict().keys()
    assert weights.keys() == {f"trainable_module.heads.{name}" for name in names} | {
        f"trainable_module_ema.module.heads.{name}" for name in names
    }


def test_the_average_of_the_heads_is_what_is_evaluated_and_saved(few, tmp_path):
    model = frozen_model()
    run = fit(model, few, tmp_path, model_ema=True, model_ema_decay=0.5)
    average = run.update.task.trainable_module_ema.module.heads.state_dict()
    assert run.eval_model.backbone is model.backbone
    assert equal(load_file(run.output / "last/self_distill.safetensors"), dict(average))
    assert not equal(dict(average), dict(model.heads.state_dict()))


@pytest.mark.parametrize(
    "settings", [pytest.param({}, marks=pytest.mark.slow), {"model_ema": True, "cache_features": True}]
)
def test_a_resumed_run_gives_the_same_heads(settings, few, tmp_path):
    whole = fit(frozen_model(), few, tmp_path / "whole", **settings)
    fit(frozen_model(), few, tmp_path / "part", resume=str(tmp_path / "whole/checkpoints/step-00000002"), **settings)
    for name in ("last/self_distill.safetensors", "history.csv"):
        assert (tmp_path / "part" / name).read_bytes() == (whole.output / name).read_bytes()


@pytest.mark.slow
def test_a_checkpoint_of_the_first_versions_resumes(few, tmp_path):
    """In which the averaged heads had other names."""
    whole = fit(frozen_model(), few, tmp_path / "whole", model_ema=True)
    weights, rest, _ = read_checkpoint(tmp_path / "whole/checkpoints/step-00000002")
    average = "trainable_module_ema.module."
    renamed = {name.replace(f"{average}heads.", average): value for name, value in weights.items()}
    assert renamed.keys() != weights.keys()
    checkpoints = Checkpoints(tmp_path / "first/checkpoints", keep=1)
    checkpoints.write(Snapshot(renamed, rest), 2)
    checkpoints.wait()
    fit(frozen_model(), few, tmp_path / "part", resume=str(tmp_path / "first"), model_ema=True)
    for name in ("last/self_distill.safetensors", "history.csv"):
        assert (tmp_path / "part" / name).read_bytes() == (whole.output / name).read_bytes()


def test_a_plain_network_of_numbered_layers_resumes_with_its_average(few, tmp_path):
    def run(output, **settings):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10))
        config = TrainConfig(output=str(output), epochs=2, batch_size=40, workers=0, model_ema=True, **settings)
        trainer = Trainer(ClassificationTask(network, verbose=False), *few, config)
        trainer.fit()
        return trainer

    whole = run(tmp_path / "whole")
    part = run(tmp_path / "part", resume=str(tmp_path / "whole/checkpoints/step-00000002"))
    assert equal(dict(part.eval_model.state_dict()), dict(whole.eval_model.state_dict()))


def test_a_checkpoint_of_heads_on_another_backbone_is_refused(few, tmp_path):
    fit(frozen_model(), few, tmp_path, epochs=1)
    with pytest.raises(ValueError, match="frozen backbone had different weights; .*pretrained weights"):
        fit(frozen_model(seed=1), few, tmp_path, resume="latest")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {"batch_size": 20, "grad_accum_steps": 2, "workers": 2},
                {"channels_last": True, "smoothing": 0.1},
                {"amp": True, "amp_dtype": "bfloat16"},
            )
        ),
    ],
    ids=str,
)
def test_cached_features_give_the_same_result(settings, few, tmp_path):
    seen = fit(frozen_model(), few, tmp_path / "seen", **settings)
    cached = fit(frozen_model(), few, tmp_path / "cached", cache_features=True, **settings)
    heads, other = (run.eval_model.heads.state_dict() for run in (seen, cached))
    for key, value in heads.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "cached" / FOLDER).exists()
    assert [row["top1_exit_0"] for row in seen.state.history] == [row["top1_exit_0"] for row in cached.state.history]


def test_with_cached_features_the_backbone_sees_each_image_once(few, tmp_path):
    model, seen = frozen_model(), []
    model.backbone.layer1.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    trainer = Trainer(
        SelfDistillTask(model),
        *few,
        TrainConfig(output=str(tmp_path), workers=0, batch_size=40, epochs=3, cache_features=True),
    )
    saved, counts = trainer.saved, []
    save_missing = saved.save_missing
    saved.save_missing = lambda *args: (counts.append(sum(seen)), save_missing(*args))[1]
    seen.clear()
    saved.save = lambda *_, **__: True  # which runs the model, to see that it can be loaded
    trainer.fit()
    one_for_its_shape = 1
    assert counts == [95 + 50 + 2 * one_for_its_shape]


@pytest.mark.slow
def test_two_processes_train_frozen_exits_and_share_the_cache(few_images, tmp_path):
    command = [
        ROOT / "examples/train.py",
        "--data-dir",
        few_images,
        "--model",
        "test_resnet",
        "--epochs",
        2,
        "-b",
        40,
        "-j",
        0,
        "--freeze-backbone",
        "--no-aug",
        "--unlabelled",
    ]
    run_python(*command, "--output", tmp_path / "seen", processes=2)
    run_python(*command, "--output", tmp_path / "cached", "--cache-features", processes=2)
    seen, cached = (load_file(tmp_path / name / "last/self_distill.safetensors") for name in ("seen", "cached"))
    for key, value in seen.items():
        torch.testing.assert_close(cached[key], value, rtol=1e-4, atol=1e-5)
    backbones = [load_file(tmp_path / name / "last/model.safetensors") for name in ("seen", "cached")]
    assert equal(*backbones)


def test_the_best_exits_are_those_of_the_best_mean():
    metrics = [
        ExitMetrics(0, 40.0, 90, 1),
        ExitMetrics(1, 60.0, 90, 1),
        ExitMetrics(2, 80.0, 90, 1),
        ExitMetrics("ensemble", 70.0, 90, 1),
    ]
    assert deciding_metric(metrics, frozen=True) == 50
    assert deciding_metric(metrics, frozen=False) == 80
    assert deciding_metric([ExitMetrics(0, 30.0, 90, 1)], frozen=False) == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unlabelled": True}, r"unlabelled \(--unlabelled\) .*frozen backbone, .*\(--freeze-backbone\)"),
        ({"cache_features": True}, r"cache_features \(--cache-features\) .*frozen backbone, .*\(--freeze-backbone\)"),
    ],
)
def test_what_needs_a_frozen_backbone(settings, message, few, tmp_path):
    for task in (
        SelfDistillTask(small_model(in_chans=1)),
        ClassificationTask(small_backbone(in_chans=1), verbose=False),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(task, *few, TrainConfig(output=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unlabelled": True, "smoothing": 0.1}, "smoothing .*unlabelled .*leave one"),
        ({"cache_features": True, "mixup": 0.2}, r"cache_features .*mixup \(--mixup\) .*leave one"),
        ({"cache_features": True, "cutmix": 1.0}, r"cache_features .*cutmix \(--cutmix\) .*leave one"),
        ({"cache_features": True, "on_bad_sample": "skip"}, "on_bad_sample must be 'raise' with cache_features"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


DATA_CONFIG = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}


def test_a_cache_of_augmented_images_is_refused(fashion, tmp_path):
    train, val = fashion.transformed(DATA_CONFIG, hflip=0.5)
    for data in (train, Subset(train, range(100))):  # which tells, and of which some images are read twice
        with pytest.raises(ValueError, match=r"cache_features .*augmented .*no_aug=True \(--no-aug\)"):
            fit(frozen_model(), (data, val), tmp_path / "out", cache_features=True)


def test_a_cache_of_a_stream_is_refused(tmp_path):
    stream = load_images(EMBEDDED, streaming=True).transformed(DATA_CONFIG, no_aug=True)
    whole = load_images(EMBEDDED).transformed(DATA_CONFIG, no_aug=True)
    for data in (stream, (whole[0], stream[1])):
        with pytest.raises(
            ValueError, match="cache_features does not work with streaming.*leave out streaming or cache_features"
        ):
            fit(frozen_model(), data, tmp_path / "out", cache_features=True)


def test_a_disk_that_is_too_small_for_the_cache(few, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(OSError, match=rf"features .*\d MB, .*{tmp_path} .* 1 MB free \(.+\); .*cache_features"):
        fit(frozen_model(), few, tmp_path, cache_features=True)
    assert not (tmp_path / FOLDER).exists()
    assert not (tmp_path / "config.yaml").exists()  # so that the corrected command may have the directory


def test_a_disk_that_fills_up_before_there_is_room_for_the_cache(few, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=rf"features .*\d MB, .*{tmp_path} .*\(No space left.*\); .*cache_features"):
        fit(frozen_model(), few, tmp_path, cache_features=True)
    assert not (tmp_path / FOLDER).exists()


def test_a_run_that_was_killed_leaves_no_features(few, tmp_path):
    run = fit(frozen_model(), few, tmp_path, epochs=1)
    (run.output / FOLDER / "train").mkdir(parents=True)
    (run.output / FOLDER / "train/0.bin").write_bytes(b"left")
    fit(frozen_model(), few, tmp_path, epochs=2, resume="latest")
    assert not (run.output / FOLDER).exists()


def test_a_folder_of_the_users_own_stays(few, tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "features/mine.txt").write_text("mine")
    fit(frozen_model(), few, tmp_path, epochs=1, cache_features=True)
    assert (tmp_path / "features/mine.txt").read_text() == "mine"


def test_a_signal_while_the_backbone_looks_at_the_images(few, tmp_path):
    """It is heeded before the next batch; the run goes on afterwards as if nothing had been."""

    def forward(x):
        if len(x) == 40:
            seen.append(len(x))
            os.kill(os.getpid(), signal.SIGTERM)
        return SelfDistillModel.forward_backbone(model, x)

    whole = fit(frozen_model(), few, tmp_path / "whole", epochs=1, cache_features=True)
    model, seen = frozen_model(), []
    trainer = Trainer(
        SelfDistillTask(model),
        *few,
        TrainConfig(
            output=str(tmp_path / "run"),
            epochs=1,
            batch_size=40,
            workers=0,
            warmup_epochs=0,
            seed=0,
            cache_features=True,
        ),
    )
    model.forward_backbone = forward
    result = trainer.fit()
    assert result.interrupted_by == signal.SIGTERM
    assert seen == [40]
    assert not (tmp_path / "run" / FOLDER).exists()
    resumed = fit(frozen_model(), few, tmp_path / "run", epochs=1, cache_features=True, resume="latest")
    assert equal(*(dict(run.eval_model.heads.state_dict()) for run in (whole, resumed)))


def test_a_cache_is_the_images_before_and_after_a_run(few, tmp_path):
    trainer = Trainer(
        SelfDistillTask(frozen_model()),
        *few,
        TrainConfig(output=str(tmp_path), epochs=1, batch_size=40, workers=0, cache_features=True),
    )
    before = trainer.evaluate()
    trainer.fit()
    assert trainer.evaluate() == trainer.metrics
    assert [metric.exit for metric in before] == [metric.exit for metric in trainer.metrics]
    assert FOLDER not in Path("/proc/self/maps").read_text()


def test_layer_decay_of_a_frozen_backbone(few, tmp_path):
    with pytest.raises(ValueError, match="layer_decay .*frozen; leave one"):
        fit(frozen_model(), few, tmp_path, layer_decay=0.5)


def test_the_card_tells_that_the_network_is_as_it_was(few, tmp_path):
    run = fit(frozen_model(), few, tmp_path, epochs=1)
    record = read_metrics(run.output / "best")
    run.eval_model.truncate(0).save_pretrained(tmp_path / "first", metrics=record)
    for name in ("best", "first"):
        card = (tmp_path / name / "README.md").read_text()
        assert re.search("frozen.* shallow classifiers", card)
        assert "trained together" not in card


def test_nothing_that_learns(few, tmp_path):
    with pytest.raises(ValueError, match="frozen .*head_lr_scale .*0: .*leave one"):
        fit(frozen_model(), few, tmp_path, head_lr_scale=0.0)


def test_the_class_names_of_a_frozen_network_are_kept(few_images, tmp_path):
    """Images with labels of other classes are refused; without labels the data's are not used."""
    backbone = small_backbone()
    backbone.pretrained_cfg.update(label_names=[f"own{index}" for index in range(10)], input_size=(3, 32, 32))
    wrap_self_distill(backbone).save_pretrained(tmp_path / "own")
    command = [
        ROOT / "examples/train.py",
        "--model",
        f"local-dir:{tmp_path / 'own'}",
        "--pretrained",
        "--epochs",
        1,
        "--data-dir",
        few_images,
        "-b",
        50,
        "-j",
        0,
        "--freeze-backbone",
        "--no-aug",
    ]
    done = run_python(*command, "--output", tmp_path / "a", check=False)
    assert done.returncode == 2
    assert re.fullmatch("train.py: error: .*'own0', .*'T-shirt/top', .*--unlabelled.*\n", done.stderr)
    assert not (tmp_path / "a").exists()
    done = run_python(*command, "--unlabelled", "--output", tmp_path / "b")
    assert re.search(r"\(10: T-shirt/top, .*network \(10: own0, .*agreement with the deepest exit", done.stderr)
    assert "agreement with the deepest exit" in done.stdout
    config = json.loads((tmp_path / "b/best/config.json").read_text())
    assert config["label_names"] == backbone.pretrained_cfg["label_names"]
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("own", "b/best"))
    assert equal(before, after)
