"""The training run around any `timm.task.TrainingTask`."""
import math
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..cost import evaluating
from ..model import SelfDistillModel
from .accelerator import create_accelerator, start_trackers
from .checkpoint import keep_unwrapped_weights, plain, save_checkpoint, set_newer_aside
from .config import TrainConfig
from .interrupt import InterruptRequest, leave_process_group
from .metrics import ExitMeter, ExitMetrics, exit_logits
from .mixing import TargetMixer
from .progress import ProgressReporter
from .report import plot_curves, write_history
from .run_directory import open_run, write_config
from .sampling import EpochSampler
from .saved_models import SavedModels
from .state import TrainResult, TrainState
from .upload import check_pushable, create_uploader


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
        ValueError: a setting cannot work: fp16 on a CPU, model and data differ in their classes, too few images, ...
        FileExistsError: `config.output` holds another run.
        FileNotFoundError: there is nothing to resume.
    """

    def __init__(self, task: TrainingTask, train_data: Dataset, val_data: Dataset, config: TrainConfig | None = None):
        if not isinstance(task, TrainingTask):
            raise TypeError(f"expected a timm.task.TrainingTask such as SelfDistillTask, got {type(task).__name__}")
        for name, data in (("training", train_data), ("validation", val_data)):
            if not len(data):
                raise ValueError(f"there are no {name} images")
        self.config = config = config or TrainConfig()
        self.accelerator = create_accelerator(config)
        self.input_size = tuple(train_data[0][0].shape)
        self.mixer = TargetMixer(config, _check_classes(task.get_eval_model(), train_data))
        self._create_loaders(train_data, val_data)
        self._prepare(task)
        check_pushable(config, self.eval_model)
        self.output, self.checkpoint = open_run(config, self.accelerator)
        self.state = TrainState(self.sampler.global_batch, self.sampler.usable)
        self.accelerator.register_for_checkpointing(self.state)
        self.interrupt = InterruptRequest(self.accelerator)
        self.metrics: list[ExitMetrics] = []
        self.saved = SavedModels(self.output, config, self.accelerator, val_data, self.input_size)
        self.uploader = create_uploader(config, self.output, self.accelerator)

    def _create_loaders(self, train_data: Dataset, val_data: Dataset) -> None:
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        self.sampler = EpochSampler(len(train_data), config.batch_size * world, rank, world, config.seed)
        self.loading_seeds = torch.Generator()
        common = {"num_workers": config.workers, "persistent_workers": config.workers > 0,
                  "pin_memory": self.accelerator.device.type == "cuda", "worker_init_fn": leave_process_group,
                  "generator": self.loading_seeds}
        self.train_loader = DataLoader(train_data, config.batch_size, sampler=self.sampler, drop_last=True, **common)
        own_share = Subset(val_data, range(rank, len(val_data), world))
        self.val_loader = DataLoader(own_share, config.validation_batch_size or config.batch_size, **common)
        self.updates_per_epoch = -(-len(self.train_loader) // config.grad_accum_steps)

    def _prepare(self, task: TrainingTask) -> None:
        config = self.config
        if isinstance(task.get_eval_model(), SelfDistillModel):
            task.get_eval_model().early_exit = None  # thresholds of the weights as they are now
        set_seed(config.seed, device_specific=True)
        model = task.get_trainable_module()
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if config.torchcompile:
            model.compile()
        optimizer = create_optimizer_v2(
            model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum)
        self.schedule, _ = create_scheduler_v2(
            optimizer, config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr, min_lr=config.min_lr, decay_epochs=config.decay_epochs,
            decay_milestones=list(config.decay_milestones), decay_rate=config.decay_rate,
            step_on_epochs=False, updates_per_epoch=self.updates_per_epoch)
        self.task, self.optimizer = self.accelerator.prepare(task, optimizer)
        self.plain_task = plain(self.accelerator, self.task)
        if config.model_ema:
            self.plain_task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        keep_unwrapped_weights(self.accelerator)

    @property
    def eval_model(self) -> nn.Module:
        """What is evaluated and saved: the model, or its moving average."""
        model = self.plain_task.get_eval_model(ema=self.config.model_ema)
        return plain(self.accelerator, getattr(model, "module", model))

    def fit(self) -> TrainResult:
        """Train, evaluate and save. SIGINT and SIGTERM end it early, with a checkpoint.

        Raises:
            FloatingPointError: the loss became NaN or infinite; the last checkpoint stays.
            ValueError: the model cannot be saved (found before the first step), or an image cannot be read.
        """
        state, config = self.state, self.config
        if self.checkpoint:
            self._resume(self.checkpoint)
        start_trackers(self.accelerator, config, self.output)
        if not self.checkpoint:
            self._save_model("last", None)
        self.progress = ProgressReporter(
            self.updates_per_epoch * config.epochs, state.updates, self.accelerator.is_main_process)
        if self.uploader:
            self.uploader.start()
        try:
            summary = self._train()
            self.accelerator.end_training()
        finally:
            upload = self.uploader and self.uploader.finish(self.progress)
        return TrainResult(
            self.output, state.history, summary, None if summary else self.interrupt.received, upload)

    def _train(self) -> dict[str, Any] | None:
        """Train to the end; the summary, or None where a request to stop came before."""
        state, config = self.state, self.config
        with self.progress, self.interrupt.listening():
            if self.checkpoint:
                self.progress.say(f"resumed {self.checkpoint}: epoch {state.epoch + 1}, update {state.updates}")
            while state.epoch < config.epochs and not self.interrupt.agreed:
                if self._train_epoch():
                    self._finish_epoch()
        if state.epoch < config.epochs:
            self._save_checkpoint()
            return None
        summary = self._summarize()
        if self.uploader:
            self.uploader.push("best", f"Best model of {config.epochs} epochs")
        return summary

    def _resume(self, checkpoint: Path) -> None:
        self.accelerator.load_state(str(checkpoint))
        if self.accelerator.is_main_process:
            set_newer_aside(checkpoint, self.output / "checkpoints")
            write_config(self.config, self.output)
        self.accelerator.wait_for_everyone()

    def evaluate(self) -> list[ExitMetrics]:
        """Accuracy of every exit and of the ensemble on the validation data."""
        model, accelerator = self.eval_model, self.accelerator
        meter = ExitMeter(len(model.exits) if isinstance(model, SelfDistillModel) else 1, accelerator.device)
        with evaluating(model), torch.no_grad(), accelerator.autocast():
            for batch in self.val_loader:
                x, y = self._to_device(batch)
                meter.update(exit_logits(model, x), y)
        return meter.compute(accelerator.reduce(meter.totals, "sum"))

    def _train_epoch(self) -> bool:
        """Train what is left of the epoch; False if a request to stop came before its end."""
        state, config = self.state, self.config
        self.task.train()
        self.sampler.begin(state.epoch, state.images)
        # Seeds of the loading processes; a tuple of integers has the same hash in every process.
        self.loading_seeds.manual_seed(hash((config.seed, state.epoch, self.accelerator.process_index)))
        images_per_batch = config.batch_size * self.accelerator.num_processes
        began, first_image, pending = time.perf_counter(), state.images, []
        batches = iter(self.train_loader)
        while group := list(islice(batches, config.grad_accum_steps)):
            pending.append(self._update(group))
            state.images += len(group) * images_per_batch
            self.rate = (state.images - first_image) / (time.perf_counter() - began)
            self.progress.advance()
            if len(pending) == config.log_interval:
                self._record_losses(pending)
                pending = []
            if self.interrupt.agree(state.updates):
                break
        self._record_losses(pending)
        return state.images == self.sampler.usable

    def _update(self, group: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One optimizer update from `grad_accum_steps` batches; the mean loss and its parts, still on the device."""
        accelerator, losses = self.accelerator, {}
        for index, batch in enumerate(group):
            x, y = self.mixer(*self._to_device(batch), self.state.epoch)
            with nullcontext() if index == len(group) - 1 else accelerator.no_sync(self.task):
                result = self.task(x, y)
                accelerator.backward(result["loss"] / len(group))
            for name in (key for key in result if key.endswith("loss")):
                losses[name] = losses.get(name, 0) + result[name].detach().float() / len(group)
        if self.config.clip_grad is not None:
            accelerator.clip_grad_norm_(self.task.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.updates += 1
        if self.schedule is not None:
            self.schedule.step_update(self.state.updates)
        self.plain_task.update_ema(step=self.state.updates)
        return losses

    def _record_losses(self, pending: list[dict[str, Tensor]]) -> None:
        """Bring the losses of the last updates from the device, average them over the processes, and look at them."""
        if not pending:
            return
        state, names = self.state, list(pending[0])
        values = torch.stack([torch.stack([losses[name] for name in names]) for losses in pending])
        values = self.accelerator.reduce(values, "mean").double().cpu()
        for offset, loss in enumerate(values[:, names.index("loss")].tolist(), start=1):
            self._check_finite([loss], state.updates - len(pending) + offset, "loss")
        for name, total in zip(names, values.sum(0).tolist()):
            state.losses[name] = state.losses.get(name, 0.0) + total
        state.losses["updates"] = state.losses.get("updates", 0) + len(pending)
        mean = float(values[:, names.index("loss")].mean())
        self.progress.note(state.epoch, self.config.epochs, mean, self.rate)
        if self.config.report_to:
            self.accelerator.log({"train_loss": mean, "lr": self._lr()}, step=state.updates)

    def _check_finite(self, losses: list[float], update: int, what: str) -> None:
        for loss in losses:
            if not math.isfinite(loss):
                kept = f"{self.checkpoint} stays" if self.checkpoint else "there was no checkpoint yet"
                raise FloatingPointError(
                    f"the {what} is {loss} at update {update} (epoch {self.state.epoch + 1}); {kept};"
                    " try a lower lr, clip_grad, or bfloat16 instead of float16"
                )

    def _finish_epoch(self) -> None:
        """Evaluate, record and save."""
        state, accelerator = self.state, self.accelerator
        if accelerator.num_processes > 1:
            distribute_bn(self.eval_model, accelerator.num_processes, reduce=True)
        self.metrics = metrics = self.evaluate()
        self._check_finite([metric.loss for metric in metrics], state.updates, "validation loss")
        losses, updates = state.losses, state.losses.pop("updates")
        row: dict[str, Any] = {"epoch": state.epoch + 1, "lr": self._lr(), "images_per_second": round(self.rate, 1)}
        row |= {f"train_{name}": total / updates for name, total in losses.items()}
        for metric in metrics:
            row |= {f"top1_{metric.label}": metric.top1, f"top5_{metric.label}": metric.top5,
                    f"loss_{metric.label}": metric.loss}
        state.history.append(row)
        state.epoch, state.images, state.losses = state.epoch + 1, 0, {}
        self.progress.say(
            f"epoch {state.epoch}/{self.config.epochs}  loss {row['train_loss']:.3f}  top-1 "
            + "  ".join(f"{metric.label.replace('_', ' ')} {metric.top1:.2f}" for metric in metrics)
            + f"  {self.rate:,.0f} images/s  left {self.progress.time_left()}")
        if self.config.report_to:
            accelerator.log({key: value for key, value in row.items() if key != "epoch"}, step=state.updates)
        deepest = next(metric for metric in reversed(metrics) if metric.exit != "ensemble")
        self._save_model("last", metrics)
        is_best = deepest.top1 > state.best_top1 or not (self.output / "best").exists()  # as when resumed elsewhere
        if is_best:
            state.best_top1 = deepest.top1
            self._save_model("best", metrics)
        if accelerator.is_main_process:
            write_history(self.output / "history.csv", state.history)
            plot_curves(self.output / "curves.png", state.history)
        self._save_checkpoint()
        if self.uploader:
            self.uploader.finish_epoch(state.epoch, is_best, self.progress)

    def _summarize(self) -> dict[str, Any]:
        """Write summary.json and exits.png; the same answer on every process, one of which measures the speed-ups."""
        metrics = self.metrics or self.evaluate()
        for name in ("last", "best"):
            if not (self.output / name).exists():  # a finished run that was resumed into another directory
                self._save_model(name, metrics)
        answer: list[Any] = [None]
        if self.accelerator.is_main_process:
            answer = [self.saved.summarize(self.eval_model, metrics, self.state.epoch)]
        return broadcast_object_list(answer)[0]

    def _save_model(self, name: str, metrics: list[ExitMetrics] | None) -> None:
        if self.accelerator.is_main_process:
            self.saved.save(name, self.eval_model, self.state.epoch, metrics)

    def _save_checkpoint(self) -> None:
        self.checkpoint = save_checkpoint(
            self.accelerator, self.output / "checkpoints", self.state.updates, self.config.checkpoint_hist)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch)
        return (x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x), y


def _check_classes(model: nn.Module, data: Dataset) -> int:
    classes, in_data = getattr(model, "num_classes", None), getattr(data, "num_classes", None)
    if classes is not None and in_data is not None and classes != in_data:
        raise ValueError(
            f"the model has {classes} classes, the data {in_data}; create the model with num_classes={in_data}")
    return classes or in_data
