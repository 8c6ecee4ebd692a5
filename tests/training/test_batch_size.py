"""The search of `batch_size="auto"` by itself; tests/test_cuda.py has it on a GPU."""

import random

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from timm_selfdistill import TrainConfig, Trainer
from timm_selfdistill.training.data.transforms import TargetMixer
from timm_selfdistill.training.loop.update import search, try_updates
from timm_selfdistill.training.runtime.accelerator import create_accelerator
from timm_selfdistill.training.state.snapshot import get_random_states

from ..conftest import run_python
from .test_trainer import fit, make_task, same_weights, settings


class SmallMemory(nn.Module):
    """Stands before a network and runs out of memory, as torch does on a GPU, above so many images."""

    def __init__(self, most: int):
        super().__init__()
        self.most, self.tried = most, []

    def forward(self, x):
        self.tried.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x


def limited_task(most: int):
    """A task whose first layer holds so many images, and that layer; copies of it share what was tried."""
    task, memory = make_task(), SmallMemory(most)
    memory.__class__ = type("Shared", (SmallMemory,), {"__deepcopy__": lambda self, _: self})
    backbone = task.get_trainable_module().backbone
    backbone.conv1 = nn.Sequential(memory, backbone.conv1)
    return task, memory


def attempt_on(task, **changes):
    config = TrainConfig(batch_size="auto", **changes)
    mixer, accelerator = TargetMixer(config, 10), create_accelerator(config)
    return lambda batch_size: try_updates(accelerator, task, mixer, config, (1, 32, 32), batch_size)


def test_the_largest_power_of_two_that_fits_is_found():
    task, memory = limited_task(50)
    assert search(attempt_on(task), 100) == 32
    assert memory.tried == [64, 32, 32]  # no more than there are images; two updates of what fits


@pytest.mark.parametrize(
    ("fits", "most", "found"),
    [(10**6, 10**6, 1024), (10**6, 400, 256), (2, 400, 2), (1, 400, 0), (10**6, 3, 2), (10**6, 1, 2)],
)
def test_between_two_images_and_1024(fits, most, found):
    def attempt(batch_size):
        if batch_size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert search(attempt, most) == found


def test_another_error_is_not_taken_for_full_memory():
    def attempt(batch_size):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        search(attempt, 400)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"opt": "adamw", "mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1, "model_ema": True, "channels_last": True},
        {"amp": True, "amp_dtype": "bfloat16"},
    ],
)
def test_nothing_is_left_of_the_search(changes):
    task, _ = limited_task(20)
    expected = make_task()
    before = get_random_states(), random.random(), np.random.rand(), torch.rand(1)
    random.setstate(before[0]["python"])
    torch.set_rng_state(before[0]["torch"])
    np.random.seed(3)
    numpy_before = np.random.get_state()[1].copy()
    assert search(attempt_on(task, **changes), 64) == 16
    assert not torch.is_autocast_enabled("cpu")
    assert random.random() == before[1]
    assert torch.equal(torch.rand(1), before[3])
    assert (np.random.get_state()[1] == numpy_before).all()
    backbone = task.get_trainable_module().backbone
    backbone.conv1 = backbone.conv1[1]
    same_weights(task, expected, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in task.parameters())


def test_all_processes_take_the_smallest():
    done = run_python("tests/training/run_batch_size.py", processes=2)
    assert sorted(line for line in done.stdout.split("\n") if "became" in line) == ["256 became 64", "64 became 64"]


def test_there_is_nothing_to_find_on_a_cpu(fashion_tensors, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(ValueError, match=r"batch_size auto .*no GPU; set a number"):
        fit(tmp_path / "run", fashion_tensors, batch_size="auto")
    assert not (tmp_path / "run").exists()
    done = run_python("examples/train.py", "--output", tmp_path / "run", "-b", "auto", check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: batch_size auto ")
    assert "no GPU; set a number" in last


def test_a_resumed_run_takes_the_batch_size_of_its_checkpoint(fashion_tensors, tmp_path):
    fit(tmp_path, fashion_tensors, epochs=1, batch_size=40)
    config = settings(tmp_path, epochs=2, batch_size="auto", resume="latest")
    trainer = Trainer(make_task(), *fashion_tensors, config)
    assert trainer.config.batch_size == 40
    assert config.batch_size == "auto"  # what the caller holds stays
    assert trainer.fit().summary
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["batch_size"] == 40


def test_nothing_to_resume(fashion_tensors, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} .*checkpoints/"):
        fit(tmp_path, fashion_tensors, batch_size="auto", resume="latest")
