"""Runs whose heads and loss are one compiled graph, `--capture-exits`."""

import pytest
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import Subset

from timm_selfdistill import SelfDistillModel, TrainConfig, Trainer

from ..conftest import run_python, small_backbone
from .test_trainer import fit, interrupt_after, make_task, settings


@pytest.fixture
def few(fashion_tensors):
    return tuple(Subset(part, range(100)) for part in fashion_tensors)


def test_they_are_those_of_separate_operations(few, tmp_path):
    changes = {"epochs": 1, "batch_size": 10, "grad_accum_steps": 2, "model_ema": True, "clip_grad": 1.0}
    plain, _ = fit(tmp_path / "plain", few, **changes)
    captured, task = fit(tmp_path / "captured", few, capture_exits="aot_eager", **changes)
    assert task._captured.compiled is not task._captured.run
    for name, value in plain.history[0].items():
        if "loss" in name:
            assert captured.history[0][name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.slow
def test_interrupted_and_resumed_they_are_the_same_to_the_bit(few, tmp_path, monkeypatch):
    changes = {"epochs": 2, "batch_size": 20, "capture_exits": "aot_eager"}
    fit(tmp_path / "whole", few, **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        fit(tmp_path / "parts", few, **changes)
    fit(tmp_path / "parts", few, resume="latest", **changes)
    whole, parts = (SelfDistillModel.from_pretrained(tmp_path / name / "last") for name in ("whole", "parts"))
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in parts.state_dict().items())


@pytest.mark.slow
def test_on_two_processes(tmp_path):
    command = ["examples/train.py", "--model", "test_resnet", "--epochs", 1, "-b", 32, "--img-size", 32]
    runs = []
    for name, flags in (("a", []), ("b", ["--capture-exits", "aot_eager"])):
        run_python(*command, *flags, "--output", tmp_path / name, processes=2)
        runs.append(SelfDistillModel.from_pretrained(tmp_path / name / "last"))
    for one, other in zip(*(run.parameters() for run in runs)):
        assert (one - other).norm() <= 0.05 * one.norm() + 1e-3


def test_networks_without_exits_and_whole_networks_are_refused(few, tmp_path):
    plain = ClassificationTask(small_backbone(in_chans=1), nn.CrossEntropyLoss(), verbose=False)
    with pytest.raises(ValueError, match="capture_exits .* exits, but ClassificationTask"):
        Trainer(plain, *few, settings(tmp_path, capture_exits=True))
    with pytest.raises(ValueError, match="torchcompile .*; leave capture_exits out"):
        TrainConfig(torchcompile=True, capture_exits=True)


def test_torchcompile_covers_the_loss(few, tmp_path):
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    _, task = fit(tmp_path, few, make_task(), epochs=1, torchcompile="eager")
    assert task._compiled_call_impl is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
