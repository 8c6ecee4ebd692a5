"""The methods to compare with and the analyses on a GPU."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import DataLoader

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer
from timm_selfdistill.analysis import measure_agreement, measure_flatness, measure_gradients, measure_separability

from .baselines.test_runs import TASKS, make
from .conftest import small_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("amp_dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("method", TASKS)
def test_a_run_of_each_method(method, amp_dtype, fashion_tensors, tmp_path):
    task = make(method)
    before = copy.deepcopy(task.state_dict())
    config = TrainConfig(
        output=str(tmp_path),
        epochs=2,
        batch_size=50,
        workers=0,
        lr=0.02,
        channels_last=True,
        amp=amp_dtype is not None,
        amp_dtype=amp_dtype or "float16",
    )
    result = Trainer(task, *fashion_tensors, config).fit()
    assert len(result.history) == 2
    assert result.history[1]["train_loss"] < result.history[0]["train_loss"]
    for name, value in task.state_dict().items():
        assert value.isfinite().all(), name
        if name.startswith("teacher."):
            assert torch.equal(value.cpu(), before[name]), name


@pytest.fixture
def loader(fashion_tensors):
    return DataLoader(fashion_tensors[1], 50)


@pytest.fixture
def models():
    """The same on both devices."""
    torch.manual_seed(0)
    model = small_model("resnet10t", in_chans=1)
    return copy.deepcopy(model), model.cuda()


def test_flat_minima(models, loader):
    first, second = (measure_flatness(model, loader, levels=[0.05], draws=2) for model in models)
    for a, b in zip(first.rows(), second.rows()):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert next(models[1].parameters()).is_cuda


@pytest.mark.parametrize("plain", [True, False])
def test_gradients(plain, models, loader):
    tasks = [
        ClassificationTask(model.backbone, nn.CrossEntropyLoss(), verbose=False) if plain else SelfDistillTask(model)
        for model in models
    ]
    first, second = (measure_gradients(task, loader) for task in tasks)
    assert first.sections == second.sections
    assert second.gradients == pytest.approx(first.gradients, rel=1e-2)


def test_separability_and_agreement(models, loader):
    first, second = (measure_separability(model, loader) for model in models)
    assert [row.ratio for row in second.rows] == pytest.approx([row.ratio for row in first.rows], rel=1e-3)
    first, second = (measure_agreement(model, loader) for model in models)
    assert first.to_dict() == second.to_dict()
