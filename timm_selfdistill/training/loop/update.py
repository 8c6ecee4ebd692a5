"""One optimizer update, and the largest batch for it."""

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
"""Updates in a row that `on_nan="skip"` leaves out before it gives up."""

Losses = dict[str, Tensor]
Input = TypeVar("Input")
"""A batch of images, or what a data set has in their place."""


class Updater:
    """Makes updates from batches; nothing in it waits for a GPU, but for fp16's loss scale and `on_nan="skip"`.

    Args:
        task: timm's, as it is.
        wrapped: what Accelerate made of it; forward passes go through this.
        schedule: of the learning rate; None is constant.
        epochs: of the run.
        updates_per_epoch: at full length.
        memory: of the images' answers, for a task that learns from it.
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
        """Update the weights once, from `grad_accum_steps` batches (at the end of an epoch perhaps fewer).

        Args:
            update: its number, from 1.
            position: likewise, had all epochs been as long as this one.

        Returns:
            The mean loss and its parts, still on the device; None where the gradients are not finite and the update was
            left out.

        Raises:
            FloatingPointError: too many updates in a row had to be left out.
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
            self._leave_out(update, buffers)
            return None
        if self.memory:
            self.memory.write()
        self.skipped_in_a_row = 0
        self.task.update_ema(step=update)
        return losses

    @property
    def eval_model(self) -> nn.Module:
        """What is to be evaluated and saved: the model, or its moving average; without what wraps it."""
        model = eval_model(self.task, average=self.config.model_ema)
        return unwrap_model(model)

    @property
    def learned_model(self) -> nn.Module:
        """What is evaluated, of a frozen backbone the heads alone: the module whose batch norm is averaged over the
        processes, and that takes cached features."""
        if not isinstance(self.task, FrozenBackboneTask):
            return self.eval_model
        return unwrap_model(self.task.get_trainable_module(ema=self.config.model_ema))

    def train(self, epoch: int) -> None:
        """Go on with training; the first epochs may be of classifiers alone."""
        self.wrapped.train()
        model = trainable_model(self.task)
        if self.config.head_warmup_epochs and isinstance(model, SelfDistillModel):
            model.train_classifiers_alone(epoch < self.config.head_warmup_epochs)

    def set_schedule(self, position: int) -> None:
        """The learning rate for the update after this one."""
        if self.schedule is None or isinstance(self.schedule, PlateauLRScheduler):
            return
        if self.config.sched_on_updates:
            self.schedule.step_update(position)
        elif epoch := position // self.updates_per_epoch:  # the first begins as the schedule does
            self.schedule.step(epoch)

    def end_epoch(self, epoch: int, metric: float | None) -> None:
        """Let the schedule "plateau" see what an epoch came to.

        Args:
            epoch: from 1.
            metric: None was not measured.
        """
        if isinstance(self.schedule, PlateauLRScheduler):
            self.schedule.step(epoch, metric)

    def repeat_epochs(self, metrics: dict[int, float | None]) -> None:
        """Likewise of all epochs of a run that is resumed, from the beginning."""
        if isinstance(self.schedule, PlateauLRScheduler) and metrics:
            self.schedule.update_groups(self.schedule.base_values)
            for epoch, metric in metrics.items():
                self.schedule.step(epoch, metric)

    def fix_gradient_order(self, input_size: tuple[int, int, int]) -> None:
        """Two passes that leave no trace but in DistributedDataParallel, which puts its gradients in another order
        after the first: with more than two processes the first sums of a resumed run would differ in rounding."""
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
        self._put_back(buffers)

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
        """What the task gives for a batch."""
        x, y, _, indices = batch
        x, y = self.to_device(*view_by_view(x, self.mixer.check(y)))
        if self.memory is None:
            return self.wrapped(*self.mixer(x, y, epoch))
        images, target, weight = self.mixer.mix(x, y, epoch)
        indices = indices.repeat(len(weight) // len(indices))  # of each view
        result = self.wrapped(images, target, self.memory.recall(indices, weight, epoch))
        self.memory.note(indices, weight, result["answer"])
        return result

    def _keep_gradients(self) -> None:
        """Copy the gradients of the heads, to which the next batch's will be added, out of the memory of the CUDA graph
        that made them."""
        model = trainable_model(self.task)
        for parameter in cast(nn.ModuleList, model.heads).parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _clip(self) -> bool:
        """Clip the gradients; False where they are not finite and `on_nan` wants to know. They are the mean over the
        processes, so that all give the same answer; fp16's loss scale has its own."""
        watch = self.config.on_nan == "skip" and self.accelerator.scaler is None
        if self.config.clip_grad is None and not watch:
            return True
        limit = float("inf") if self.config.clip_grad is None else self.config.clip_grad
        if self.config.clip_mode == "norm" or self.config.clip_grad is None:
            norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit)
            return not watch or bool(norm.isfinite())
        self.accelerator.unscale_gradients()
        parameters = list(self.task.get_clip_parameters(exclude_head=self.config.clip_mode == "agc"))
        dispatch_clip_grad(parameters, limit, mode=self.config.clip_mode)
        return not watch or all(bool(p.grad.isfinite().all()) for p in self.wrapped.parameters() if p.grad is not None)

    def _copy_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Batch norm's statistics, which a forward pass has changed before anyone sees its loss."""
        return [(buffer, buffer.clone()) for buffer in trainable_model(self.task).buffers()]

    def _leave_out(self, update: int, buffers: list[tuple[Tensor, Tensor]]) -> None:
        if self.memory:
            self.memory.forget()
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise FloatingPointError(
                f"the gradients of {MOST_SKIPPED} updates in a row are not finite, the last is update {update}; try a"
                " lower lr or clip_grad"
            )
        self._put_back(buffers)

    def _put_back(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
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
    """Optimizer, schedule and moving average around a task, on Accelerate's devices.

    Raises:
        ValueError: batch norm or a teacher cannot work with these settings.
    """
    set_seed(mixed_seed(config.seed, accelerator.process_index))
    freeze_teacher(task)
    model = trainable_model(task)
    if config.head_warmup_epochs and not isinstance(model, SelfDistillModel):
        raise ValueError("head_warmup_epochs is for shallow classifiers on a backbone that learns with them later")
    _prepare_batch_norm(accelerator, model, config)
    if config.channels_last:
        task.to(memory_format=torch.channels_last)  # a teacher, too
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
    """The network with its loss, or heads and loss alone."""
    if config.torchcompile:
        backend = "inductor" if config.torchcompile is True else config.torchcompile
        nn.Module.compile(task, backend=backend, mode=config.torchcompile_mode)  # timm's own leaves the loss out
        eval_model(task).compile(backend=backend, mode=config.torchcompile_mode)
    if config.capture_exits:
        if not isinstance(task, SelfDistillTask):
            raise ValueError(f"capture_exits is for networks with exits, and {type(task).__name__} trains none")
        backend = "inductor" if config.capture_exits is True else config.capture_exits
        task.capture_exits(known_batch_size(config), backend)


def _prepare_batch_norm(accelerator: Accelerator, model: nn.Module, config: TrainConfig) -> None:
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    if norms and config.batch_size == 1 and not (config.sync_bn and accelerator.num_processes > 1):
        raise ValueError(
            f"batch norm ({type(norms[0]).__name__}) learns nothing from one image: batch_size must be at least 2, or"
            " the model one without batch norm"
        )
    if config.sync_bn:
        if accelerator.device.type == "cpu":
            raise ValueError("sync_bn needs GPUs (torch's SyncBatchNorm does not run on a CPU); leave it out")
        convert_sync_batchnorm(model)


LARGEST, SMALLEST = 1024, 2
"""Batches tried, in powers of two; batch norm learns nothing from one image, and mixup pairs them."""


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
    """The config with a number where it says "auto": that of the checkpoint it resumes, or the largest that fits.

    Args:
        input_size: (channels, height, width) of the images.
        images: for training; None is not known.
        checkpoint: that is resumed.
        reserved: bytes that the run will need beside its updates.

    Raises:
        ValueError: there is no GPU, or not even the smallest batch fits.
    """
    if config.batch_size != "auto":
        return config
    if checkpoint:
        return replace(config, batch_size=int(read_settings(checkpoint)["batch_size"]))
    if accelerator.device.type == "cpu":
        raise ValueError("batch_size auto tries how much a GPU's memory holds, and there is no GPU; give a number")
    attempt = partial(try_updates, accelerator, task, mixer, config, input_size, reserved=reserved)
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
    accelerator: Accelerator,
    task: TrainingTask,
    mixer: TargetMixer,
    config: TrainConfig,
    input_size: tuple[int, int, int],
    batch_size: int,
    reserved: int = 0,
) -> None:
    """Two updates of a copy of the task on random images; the second holds the optimizer's state that the first made.

    No process waits for another in them. Task and random states stay as they are.

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
        if accelerator.num_processes > 1:  # DistributedDataParallel has the gradients twice
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
