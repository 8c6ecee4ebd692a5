"""One optimizer update, and the search for the largest batch size."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import find_executable_batch_size, release_memory, send_to_device, set_seed
from timm.layers import convert_sync_batchnorm
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from ...model import SelfDistillModel
from ...task import FrozenBackboneTask, SelfDistillTask, eval_model, freeze_teacher, trainable_model
from ..config import TrainConfig
from ..data.loaders import known_batch_size
from ..data.sampling import Batch, mixed_seed
from ..data.transforms import TargetMixer, view_by_view
from ..state.checkpoint import read_settings
from ..state.snapshot import get_random_states, set_random_states
from .memory import RunMemory, nothing_remembered
from .optimizer import create_optimizer, create_schedule

MOST_SKIPPED = 10
"""Consecutive updates that `on_nan="skip"` skips before it raises."""

Losses = dict[str, Tensor]
Input = TypeVar("Input")
"""A batch of images, or of what the dataset returns instead."""


class Updater:
    """Makes updates from batches, without synchronizing the GPU except for fp16's loss scale and `on_nan="skip"`.

    Args:
        task: the task itself.
        wrapped: the task as wrapped by Accelerate, which runs the forward passes.
        schedule: learning rate schedule; None for a constant learning rate.
        epochs: number of epochs of the run.
        updates_per_epoch: updates in a complete epoch.
        memory: memory of answers, for a task whose teacher it is.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: TrainingTask,
        wrapped: nn.Module,
        optimizer: AcceleratedOptimizer,
        schedule: Scheduler | None,
        mixer: TargetMixer,
        config: TrainConfig,
        epochs: int,
        updates_per_epoch: int,
        memory: RunMemory | None = None,
    ):
        self.memory = memory
        self.epochs, self.updates_per_epoch = epochs, updates_per_epoch
        self.accelerator, self.task, self.wrapped, self.optimizer = accelerator, task, wrapped, optimizer
        self.schedule, self.mixer, self.config = schedule, mixer, config
        self.skipped_in_a_row = 0

    def __call__(self, group: list[Batch], epoch: int, update: int, position: int) -> Losses | None:
        """Update the weights once, from `grad_accum_steps` batches (possibly fewer at the end of an epoch).

        Args:
            update: number of the update, from 1.
            position: position in the schedule: `update`, as if all epochs had been as long as this one.

        Returns:
            The mean loss and its parts, still on the device; None if the gradients are not finite and the update was
            skipped.

        Raises:
            FloatingPointError: too many consecutive updates were skipped.
        """
        buffers = self._copy_buffers() if self.config.on_nan == "skip" else []
        losses = self._backward(group, epoch)
        finite = self._clip()
        if finite:
            self.optimizer.step()
            if self.config.on_nan == "skip" and self.accelerator.scaler is not None:
                finite = not self.optimizer.step_was_skipped  # by the scaler
        self.optimizer.zero_grad()
        self.set_schedule(position)
        if not finite:
            self._skip(update, buffers)
            return None
        if self.memory:
            self.memory.write()
        self.skipped_in_a_row = 0
        self.task.update_ema(step=update)
        return losses

    @property
    def eval_model(self) -> nn.Module:
        """The unwrapped model that is evaluated and saved: the trained one, or its moving average."""
        model = eval_model(self.task, average=self.config.model_ema)
        return unwrap_model(model)

    @property
    def learned_model(self) -> nn.Module:
        """The trained part of `eval_model`: beside a frozen backbone only the heads, which take cached features. Its
        batch norm statistics are averaged over the processes."""
        if not isinstance(self.task, FrozenBackboneTask):
            return self.eval_model
        return unwrap_model(self.task.get_trainable_module(ema=self.config.model_ema))

    def train(self, epoch: int) -> None:
        """Set training mode; during `head_warmup_epochs` only the classifiers train."""
        self.wrapped.train()
        model = trainable_model(self.task)
        if self.config.head_warmup_epochs and isinstance(model, SelfDistillModel):
            model.train_classifiers_alone(epoch < self.config.head_warmup_epochs)

    def set_schedule(self, position: int) -> None:
        """Set the learning rate for the next update."""
        if self.schedule is None or isinstance(self.schedule, PlateauLRScheduler):
            return
        if self.config.sched_on_updates:
            self.schedule.step_update(position)
        elif epoch := position // self.updates_per_epoch:  # the first epoch keeps the schedule's initial value
            self.schedule.step(epoch)

    def end_epoch(self, epoch: int, metric: float | None) -> None:
        """Step the plateau schedule with the metric of an epoch.

        Args:
            epoch: from 1.
            metric: None if the epoch was not validated.
        """
        if isinstance(self.schedule, PlateauLRScheduler):
            self.schedule.step(epoch, metric)

    def repeat_epochs(self, metrics: dict[int, float | None]) -> None:
        """Step the plateau schedule with the metrics of all epochs before a resume."""
        if isinstance(self.schedule, PlateauLRScheduler) and metrics:
            self.schedule.update_groups(self.schedule.base_values)
            for epoch, metric in metrics.items():
                self.schedule.step(epoch, metric)

    def fix_gradient_order(self, input_size: tuple[int, int, int]) -> None:
        """Run two passes whose only effect is on DistributedDataParallel, which reorders its gradient buckets after the
        first. Otherwise the first updates of a resumed run on more than two processes would differ in rounding."""
        if self.accelerator.num_processes <= 2:
            return
        states, buffers = get_random_states(), self._copy_buffers()
        images = known_batch_size(self.config)
        x = torch.randn(images, *input_size, generator=torch.Generator().manual_seed(0))
        y = torch.zeros(len(x), dtype=torch.long)
        for _ in range(2):
            mixed = self.mixer(*self.to_device(x, y), epoch=0)
            remembered = nothing_remembered(self.task, images, self.mixer.num_classes, self.accelerator.device)
            self.accelerator.backward(self.wrapped(*mixed, *remembered)["loss"])
            self.optimizer.zero_grad()
        set_random_states(states)
        self._restore_buffers(buffers)

    def to_device(self, x: Input, y: Tensor) -> tuple[Input, Tensor]:
        return to_device(x, y, self.accelerator.device, self.config.channels_last)

    def _backward(self, group: list[Batch], epoch: int) -> Losses:
        losses: Losses = {}
        for index, batch in enumerate(group):
            with nullcontext() if index == len(group) - 1 else self.accelerator.no_sync(self.wrapped):
                result = self._forward(batch, epoch)
                self.accelerator.backward(result["loss"] / len(group))
            if self.config.capture_exits and index == 0 and len(group) > 1:
                self._keep_gradients()
            for name in (key for key in result if key.endswith("loss")):
                losses[name] = losses.get(name, 0) + result[name].detach().float() / len(group)
        return losses

    def _forward(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """Return the output of the task for a batch."""
        x, y, _, indices = batch
        x, y = self.to_device(*view_by_view(x, self.mixer.check(y)))
        if self.memory is None:
            return self.wrapped(*self.mixer(x, y, epoch))
        images, target, weight = self.mixer.mix(x, y, epoch)
        indices = indices.repeat(len(weight) // len(indices))  # once for each view
        result = self.wrapped(images, target, self.memory.recall(indices, weight, epoch))
        self.memory.note(indices, weight, result["answer"])
        return result

    def _keep_gradients(self) -> None:
        """Copy the heads' gradients out of the memory of the CUDA graph, since those of the next batch are added to
        them."""
        model = trainable_model(self.task)
        for parameter in cast(nn.ModuleList, model.heads).parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _clip(self) -> bool:
        """Clip the gradients and return whether they are finite. This is checked only for `on_nan="skip"` and without
        fp16, whose loss scaler has its own check; all processes get the same result, since gradients are averaged."""
        check = self.config.on_nan == "skip" and self.accelerator.scaler is None
        if self.config.clip_grad is None and not check:
            return True
        limit = float("inf") if self.config.clip_grad is None else self.config.clip_grad
        if self.config.clip_mode == "norm" or self.config.clip_grad is None:
            norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit)
            return not check or bool(norm.isfinite())
        self.accelerator.unscale_gradients()
        parameters = list(self.task.get_clip_parameters(exclude_head=self.config.clip_mode == "agc"))
        dispatch_clip_grad(parameters, limit, mode=self.config.clip_mode)
        return not check or all(bool(p.grad.isfinite().all()) for p in self.wrapped.parameters() if p.grad is not None)

    def _copy_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Return buffers and copies of them: a forward pass changes batch norm statistics before its loss is known."""
        return [(buffer, buffer.clone()) for buffer in trainable_model(self.task).buffers()]

    def _skip(self, update: int, buffers: list[tuple[Tensor, Tensor]]) -> None:
        if self.memory:
            self.memory.forget()
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise FloatingPointError(
                f"the gradients of {MOST_SKIPPED} consecutive updates are not finite, up to update {update}; try a"
                " lower lr or clip_grad"
            )
        self._restore_buffers(buffers)

    def _restore_buffers(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def to_device(x: Input, y: Tensor, device: torch.device, channels_last: bool) -> tuple[Input, Tensor]:
    x, y = send_to_device((x, y), device, non_blocking=True)
    return (tree_map_only(Tensor, _channels_last, x) if channels_last else x), y


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def create_updater(
    accelerator: Accelerator,
    task: TrainingTask,
    mixer: TargetMixer,
    config: TrainConfig,
    updates_per_epoch: int,
    memory: RunMemory | None = None,
) -> Updater:
    """Create the `Updater` of a task, with optimizer, schedule and moving average, on the device of the process.

    Raises:
        ValueError: batch norm or a teacher cannot work with these settings.
    """
    set_seed(mixed_seed(config.seed, accelerator.process_index))
    freeze_teacher(task)
    model = trainable_model(task)
    if config.head_warmup_epochs and not isinstance(model, SelfDistillModel):
        raise ValueError("head_warmup_epochs needs a network with exits whose backbone is not frozen")
    _prepare_batch_norm(accelerator, model, config)
    if config.channels_last:
        task.to(memory_format=torch.channels_last)  # including a teacher
    _compile(task, config)
    optimizer = create_optimizer(model, config)
    schedule, epochs = create_schedule(optimizer, config, updates_per_epoch)
    wrapped, wrapped_optimizer = accelerator.prepare(task, optimizer)
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    return Updater(
        accelerator, task, wrapped, wrapped_optimizer, schedule, mixer, config, epochs, updates_per_epoch, memory
    )


def _compile(task: TrainingTask, config: TrainConfig) -> None:
    """Compile the network with its loss (`torchcompile`), or only heads and loss (`capture_exits`)."""
    if config.torchcompile:
        backend = "inductor" if config.torchcompile is True else config.torchcompile
        nn.Module.compile(task, backend=backend, mode=config.torchcompile_mode)  # timm's own does not compile the loss
        eval_model(task).compile(backend=backend, mode=config.torchcompile_mode)
    if config.capture_exits:
        if not isinstance(task, SelfDistillTask):
            raise ValueError(f"capture_exits needs a network with exits, but {type(task).__name__} trains none")
        backend = "inductor" if config.capture_exits is True else config.capture_exits
        task.capture_exits(known_batch_size(config), backend)


def _prepare_batch_norm(accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> None:
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    if norms and config.batch_size == 1 and not (config.sync_bn and accelerator.num_processes > 1):
        raise ValueError(
            f"batch_size must be at least 2 for a model with batch norm ({type(norms[0]).__name__}), which cannot learn"
            " from a single image, got 1"
        )
    if config.sync_bn:
        if accelerator.device.type == "cpu":
            raise ValueError("sync_bn needs GPUs (torch's SyncBatchNorm does not run on CPUs); leave it out")
        convert_sync_batchnorm(model)


LARGEST, SMALLEST = 1024, 2
"""Range of batch sizes tried, in powers of two; batch norm and mixup need at least two images."""


def find_batch_size(
    accelerator: Accelerator,
    task: TrainingTask,
    mixer: TargetMixer,
    config: TrainConfig,
    input_size: tuple[int, int, int],
    images: int | None,
    checkpoint: Path | None,
    reserved: int = 0,
) -> TrainConfig:
    """Return the config with "auto" replaced by the batch size of the checkpoint to resume, or the largest that fits.

    Args:
        input_size: (channels, height, width) of the images.
        images: number of training images; None if unknown.
        checkpoint: the checkpoint to resume, if any.
        reserved: bytes of device memory that the run needs in addition to its updates.

    Raises:
        ValueError: there is no GPU, or not even the smallest batch fits.
    """
    if config.batch_size != "auto":
        return config
    if checkpoint:
        return replace(config, batch_size=int(read_settings(checkpoint)["batch_size"]))
    if accelerator.device.type == "cpu":
        raise ValueError("batch_size auto finds what fits in GPU memory, and there is no GPU; set a number")
    attempt = partial(try_updates, accelerator, task, mixer, config, input_size, reserved=reserved)
    found = agree(accelerator, search(attempt, LARGEST if images is None else images // accelerator.num_processes))
    release_memory()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # the run reports its own peak
    if not found:
        raise ValueError(
            f"not even {SMALLEST} images fit in GPU memory; try a smaller image size or grad_checkpointing"
        )
    accelerator.print(f"batch size {found} per process, the largest power of two up to {LARGEST} that fits")
    return replace(config, batch_size=found)


def search(attempt: Callable[[int], None], most: int) -> int:
    """Return the largest power of two, up to `LARGEST` and `most`, that does not run out of memory; 0 if none does."""
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
    except RuntimeError:  # Accelerate found no size, or the call failed for another reason
        if size:
            raise
        return 0


def agree(accelerator: Accelerator, found: int) -> int:
    """Return the minimum over all processes."""
    return int(accelerator.gather(torch.tensor([found], device=accelerator.device)).min())


def try_updates(
    accelerator: Accelerator,
    task: TrainingTask,
    mixer: TargetMixer,
    config: TrainConfig,
    input_size: tuple[int, int, int],
    batch_size: int,
    reserved: int = 0,
) -> None:
    """Make two updates with a copy of the task on random images; the second includes the optimizer state of the first.

    No process waits for another. Task and random states are unchanged.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    states, device = get_random_states(), accelerator.device
    try:
        trial = copy.deepcopy(task).to(device).train()
        model = trainable_model(trial)
        if config.channels_last:
            trial.to(memory_format=torch.channels_last)
        optimizer = create_optimizer(model, config)
        if config.model_ema:
            trial.setup_ema(decay=config.model_ema_decay)
        held = [torch.empty(reserved, dtype=torch.uint8, device=device)]
        if accelerator.num_processes > 1:  # DistributedDataParallel keeps a second copy of the gradients
            held += [torch.empty_like(parameter) for parameter in model.parameters() if parameter.requires_grad]
        for _ in range(2):
            x, y = torch.randn(batch_size, *input_size), torch.randint(mixer.num_classes, (batch_size,))
            images, target = mixer(*to_device(x, y, device, config.channels_last), epoch=0)
            remembered = nothing_remembered(trial, batch_size, mixer.num_classes, device)
            with accelerator.autocast():
                loss = trial(images, target, *remembered)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        del held
    finally:
        set_random_states(states)
