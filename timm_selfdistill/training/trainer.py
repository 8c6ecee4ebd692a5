"""The training run around any `timm.task.TrainingTask`."""
import signal
import time
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Iterator

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, set_seed
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from .. import hub
from ..cost import evaluating
from ..model import SelfDistillModel
from .checkpoint import find_checkpoint, keep_unwrapped_weights, plain, save_checkpoint
from .config import TrainConfig
from .metrics import ExitMeter, ExitMetrics, exit_logits
from .progress import ProgressReporter
from .report import plot_curves, plot_exits, write_atomically, write_history, write_json
from .sampling import EpochSampler
from .summary import summarize

Batch = tuple[Tensor, Tensor]


@dataclass
class TrainResult:
    """What a run came to."""

    output: Path
    """The run directory."""
    history: list[dict[str, Any]]
    """A row per finished epoch, as in history.csv."""
    summary: dict[str, Any] | None = None
    """As in summary.json; None if the run was interrupted."""
    interrupted_by: signal.Signals | None = None
    checkpoint: Path | None = None
    """The newest checkpoint."""


@dataclass
class _State:
    """Where the run stands; travels in checkpoints."""

    epoch: int = 0
    images: int = 0
    """Images of this epoch that are behind us, over all processes."""
    updates: int = 0
    best_top1: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Trainer:
    """Trains any `timm.task.TrainingTask` with Accelerate.

    Under `torchrun` or `accelerate launch` it trains on all their processes. The run directory gets config.yaml,
    history.csv, curves.png, exits.png, summary.json, checkpoints/, best/ and last/ (saved models).

    Args:
        task: e.g. `SelfDistillTask`, or timm's `ClassificationTask`.
        train_data: map-style data set of (image (C, H, W), class index).
        val_data: likewise; every image counts once.
        config: see `TrainConfig`.

    Raises:
        TypeError: `task` is no TrainingTask.
        ValueError: the setting cannot work: fp16 on a CPU, classes of model and data differ, too few images, ...
        FileExistsError: `config.output` holds another run.
        FileNotFoundError: there is nothing to resume.
    """

    def __init__(self, task: TrainingTask, train_data: Dataset, val_data: Dataset, config: TrainConfig | None = None):
        if not isinstance(task, TrainingTask):
            raise TypeError(f"expected a timm.task.TrainingTask, got {type(task).__name__}; e.g. SelfDistillTask(model)")
        self.config = config = config or TrainConfig()
        self.accelerator = accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=list(config.report_to) or None,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("fp16 needs a GPU: on this CPU training would run in fp32; use --amp-dtype bfloat16, or no --amp")
        model = task.get_eval_model()
        self._check_classes(model, train_data)
        self.checkpoint = find_checkpoint(config.resume, config.output) if config.resume else None
        self.output = self._claim_output()
        set_seed(config.seed, device_specific=True)

        world, rank = accelerator.num_processes, accelerator.process_index
        self.sampler = EpochSampler(len(train_data), config.batch_size * world, rank, world, config.seed)
        loader_args = dict(num_workers=config.workers, pin_memory=accelerator.device.type == "cuda",
                           persistent_workers=config.workers > 0)
        self.train_loader = DataLoader(
            train_data, config.batch_size, sampler=self.sampler, drop_last=True, **loader_args)
        self.val_loader = DataLoader(
            Subset(val_data, range(rank, len(val_data), world)), config.validation_batch_size or config.batch_size,
            **loader_args)
        self.updates_per_epoch = -(-len(self.train_loader) // config.grad_accum_steps)
        self.mixup = _create_mixup(config, model)

        if config.channels_last:
            task.to(memory_format=torch.channels_last)
        optimizer = create_optimizer_v2(
            task, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum)
        self.schedule, _ = create_scheduler_v2(
            optimizer, config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr, min_lr=config.min_lr, decay_epochs=config.decay_epochs,
            decay_milestones=list(config.decay_milestones), decay_rate=config.decay_rate,
            step_on_epochs=False, updates_per_epoch=self.updates_per_epoch)
        if config.torchcompile:
            task.to(accelerator.device)
            task.compile()
        self.task, self.optimizer = accelerator.prepare(task, optimizer)
        self.plain_task = plain(accelerator, self.task)
        if config.model_ema:
            self.plain_task.setup_ema(decay=config.model_ema_decay)
        self.state = _State()
        accelerator.register_for_checkpointing(self.state)
        keep_unwrapped_weights(accelerator)
        self.interrupted_by: signal.Signals | None = None

    @property
    def eval_model(self) -> nn.Module:
        """What is evaluated and saved: the model, or its moving average."""
        model = self.plain_task.get_eval_model(ema=self.config.model_ema)
        return plain(self.accelerator, model.module if self.config.model_ema else model)

    def fit(self) -> TrainResult:
        """Train, evaluate and save; SIGINT and SIGTERM end it early with a checkpoint.

        Raises:
            FloatingPointError: the loss became NaN or infinite; the last checkpoint stays.
            ValueError: the model could not be saved (found before the first step), or an image cannot be read.
        """
        accelerator, state, config = self.accelerator, self.state, self.config
        if self.checkpoint:
            accelerator.load_state(str(self.checkpoint))
        accelerator.init_trackers("timm-selfdistill", config=None) if config.report_to else None
        self._save_model("last")
        total = self.updates_per_epoch * config.epochs
        console_on = accelerator.is_main_process
        with ProgressReporter(total, state.updates, console_on) as self.progress, self._catching_signals():
            if self.checkpoint:
                self.progress.say(f"resumed {self.checkpoint} at epoch {state.epoch + 1}, update {state.updates}")
            while state.epoch < config.epochs and not self._should_stop():
                self._train_epoch()
        if self._should_stop():
            checkpoint = self._save_checkpoint()
            self._end_trackers()
            return TrainResult(self.output, state.history, None, self.interrupted_by or signal.SIGTERM, checkpoint)
        summary = summarize(self.eval_model, state.history[-1], self._image_size())
        if accelerator.is_main_process:
            write_json(self.output / "summary.json", summary)
            plot_exits(self.output / "exits.png", summary)
        self._end_trackers()
        return TrainResult(self.output, state.history, summary, None, self.checkpoint)

    def evaluate(self) -> list[ExitMetrics]:
        """Accuracy of every exit and of the ensemble on the validation data."""
        model, accelerator = self.eval_model, self.accelerator
        classifiers = len(model.exits) if isinstance(model, SelfDistillModel) else 1
        meter = ExitMeter(classifiers, accelerator.device)
        with evaluating(model), torch.no_grad(), accelerator.autocast():
            for x, y in self.val_loader:
                x, y = self._to_device(x), self._to_device(y)
                meter.update(exit_logits(model, x), y)
        return meter.compute(accelerator.reduce(meter.totals, "sum"))

    def _train_epoch(self) -> None:
        """Train what is left of the epoch, then evaluate and save, unless interrupted."""
        state, config = self.state, self.config
        self.task.train()
        self.sampler.begin(state.epoch, state.images)
        global_batch = config.batch_size * self.accelerator.num_processes
        began, first_image, recent, losses = time.perf_counter(), state.images, [], []
        batches = iter(self.train_loader)
        while group := list(islice(batches, config.grad_accum_steps)):
            recent.append(self._update(group))
            state.updates += 1
            state.images += len(group) * global_batch
            self.progress.advance()
            if len(recent) == config.log_interval:
                losses.append(self._check_losses(recent))
                rate = (state.images - first_image) / (time.perf_counter() - began)
                self.progress.note(state.epoch, config.epochs, losses[-1][0], rate)
                recent = []
            if self._should_stop():
                break
        if recent:
            losses.append(self._check_losses(recent))
        if self._should_stop() and state.images < self.sampler.usable:
            return
        seconds = time.perf_counter() - began
        images = state.images - first_image
        self._finish_epoch(losses, images / seconds)

    def _update(self, group: list[Batch]) -> Tensor:
        """One optimizer update from `grad_accum_steps` batches; the mean loss and its parts, still on the device."""
        accelerator, config = self.accelerator, self.config
        sums: Tensor | None = None
        for index, (x, y) in enumerate(group):
            x, y = self._augment(self._to_device(x), self._to_device(y))
            last = index == len(group) - 1
            with _nothing() if last else accelerator.no_sync(self.task):
                result = self.task(x, y)
                accelerator.backward(result["loss"] / len(group))
            self._terms = [key for key, value in result.items() if key.endswith("loss")]
            values = torch.stack([result[key].detach().float() for key in self._terms])
            sums = values if sums is None else sums + values
        if config.clip_grad is not None:
            accelerator.clip_grad_norm_(self.task.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule and self.schedule.step_update(self.state.updates + 1)
        self.plain_task.update_ema(step=self.state.updates)
        return sums / len(group)
