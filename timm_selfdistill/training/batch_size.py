"""The largest batch that the memory of a GPU holds, for `batch_size="auto"`."""
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, release_memory
from timm.task import TrainingTask

from .checkpoint import read_settings
from .config import TrainConfig
from .mixing import TargetMixer
from .optimizer import create_optimizer
from .snapshot import get_random_states, set_random_states
from .update import to_device

LARGEST, SMALLEST = 1024, 2
"""Batches tried, in powers of two; batch norm learns nothing from one image, and mixup pairs them."""


def find_batch_size(
        accelerator: Accelerator, task: TrainingTask, mixer: TargetMixer, config: TrainConfig,
        input_size: tuple[int, int, int], images: int | None, checkpoint: Path | None) -> TrainConfig:
    """The config with a number where it says "auto": that of the checkpoint it resumes, or the largest that fits.

    Args:
        input_size: (channels, height, width) of the images.
        images: for training; None is not known.
        checkpoint: that is resumed.

    Raises:
        ValueError: there is no GPU, the weights are sharded, or not even the smallest batch fits.
    """
    if config.batch_size != "auto":
        return config
    if checkpoint:
        return replace(config, batch_size=int(read_settings(checkpoint)["batch_size"]))
    if accelerator.is_fsdp2:
        raise ValueError("batch_size auto tries a whole network on each GPU, which FSDP does not have; give a number")
    if accelerator.device.type == "cpu":
        raise ValueError("batch_size auto tries how much a GPU's memory holds, and there is no GPU; give a number")
    attempt = partial(try_updates, accelerator, task, mixer, config, input_size)
    found = agree(accelerator, search(attempt, LARGEST if images is None else images // accelerator.num_processes))
    release_memory()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # which the run reports
    if not found:
        raise ValueError(f"not even a batch of {SMALLEST} images fits; try a smaller image size or grad_checkpointing")
    accelerator.print(f"batch size {found} per process, the largest power of two up to {LARGEST} that fits")
    return replace(config, batch_size=found)


def search(attempt: Callable[[int], None], most: int) -> int:
    """The largest power of two, up to `LARGEST` and `most`, at which a call does not run out of memory; 0 if none."""
    size = LARGEST
    while size > max(most, SMALLEST):
        size //= 2

    def halve() -> int:
        nonlocal size
        size = size // 2 if size > SMALLEST else 0
        return size

    def find(batch_size: int) -> int:
        attempt(batch_size)
        return batch_size

    try:
        return find_executable_batch_size(find, size, halve)()
    except RuntimeError:  # Accelerate's word for "none", or another error of the call
        if size:
            raise
        return 0


def agree(accelerator: Accelerator, found: int) -> int:
    """The smallest of all processes."""
    return int(accelerator.gather(torch.tensor([found], device=accelerator.device)).min())


def try_updates(
        accelerator: Accelerator, task: TrainingTask, mixer: TargetMixer, config: TrainConfig,
        input_size: tuple[int, int, int], batch_size: int) -> None:
    """Two updates of a copy of the task on random images; the second holds the optimizer's state that the first made.

    No process waits for another in them. Task and random states stay as they are.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    states, device = get_random_states(), accelerator.device
    try:
        trial = copy.deepcopy(task).to(device).train()
        model = trial.get_trainable_module()
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        optimizer = create_optimizer(model, config)
        if config.model_ema:
            trial.setup_ema(decay=config.model_ema_decay)
        held = []
        if accelerator.num_processes > 1:  # DistributedDataParallel has the gradients twice
            held = [torch.empty_like(parameter) for parameter in model.parameters() if parameter.requires_grad]
        for _ in range(2):
            x, y = torch.randn(batch_size, *input_size), torch.randint(mixer.num_classes, (batch_size,))
            x, y = mixer(*to_device(x, y, device, config.channels_last), epoch=0)
            with accelerator.autocast():
                loss = trial(x, y)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        del held
    finally:
        set_random_states(states)
