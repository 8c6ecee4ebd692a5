"""The training run for any `timm.task.TrainingTask`."""

import math
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from timm.task import TrainingTask
from timm.utils import distribute_bn
from torch import nn

from ...model import SelfDistillModel
from ...task import check_task, eval_model, frozen_digest
from ..config import TrainConfig
from ..data.labels import check_classes, check_first_labels, check_indices, name_classes, paired
from ..data.loaders import ValBatches, check_counts, image_count, image_shape, known_batch_size, train_batches
from ..data.streams import RunImages
from ..data.transforms import TargetMixer, smooths_labels
from ..outputs.metrics import ExitMetrics, as_columns, count_logits, deciding_metric, measure_exits, of_columns
from ..outputs.run_directory import (
    OWN_FOLDER,
    RunSummary,
    check_run,
    find_resumed,
    mark_launch,
    open_run,
    release_run,
    report_history,
    write_config,
)
from ..outputs.saved_models import SavedModels
from ..outputs.trackers import RunTrackers, memory_gib
from ..outputs.upload import HubUploader, UploadResult, check_pushable, create_uploader
from ..runtime.accelerator import create_accelerator, sharing_failures
from ..runtime.interrupt import InterruptRequest
from ..runtime.progress import Interval, ProgressReporter, UpdateProfiler
from ..state.checkpoint import Checkpoints, read_checkpoint, warn_unwritten
from ..state.snapshot import HistoryRow, TrainState, describe_run, diverged, restore, take_snapshot
from .frozen import check_frozen_settings, create_caches, drop_caches, fill_caches, learns_in_parts, remove_features
from .memory import create_memory
from .optimizer import base_lr
from .update import Losses, create_updater, find_batch_size

PICTURE_INTERVAL = "120s"
"""Minimum time between plots before the end of a run: drawing can take longer than the epochs of a small run."""


@dataclass
class TrainResult:
    """Result of a training run.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, wrap_self_distill
        >>> images = [(torch.randn(3, 32, 32), index % 10) for index in range(64)]
        >>> task = SelfDistillTask(wrap_self_distill(timm.create_model("test_resnet", num_classes=10)))
        >>> config = TrainConfig(output="runs/result", epochs=1, batch_size=32, workers=0)
        >>> result = Trainer(task, images, images, config).fit()
        >>> [row["exit"] for row in result.summary["exits"]]
        [0, 1, 2, 3, 'ensemble']
    """

    output: Path
    """The run directory."""
    history: list[HistoryRow]
    """A row per finished epoch, as in history.csv."""
    summary: RunSummary | None = None
    """As in summary.json; None if the run was interrupted."""
    interrupted_by: signal.Signals | None = None
    upload: UploadResult | None = None
    """Result of the upload, on the main process of a run that pushes to the Hub."""


@dataclass
class Evaluation:
    """Result of an evaluation."""

    metrics: list[ExitMetrics]
    images: int
    """Number of images measured, over all processes."""


@dataclass
class OpenedRun:
    """The parts of a run that need its directory."""

    output: Path
    """The run directory."""
    checkpoints: Checkpoints
    uploader: HubUploader | None
    profiler: UpdateProfiler
    progress: ProgressReporter
    trackers: RunTrackers | None = None
    """None without trackers, or until they are started, once a checkpoint to resume was found to match."""


class Trainer:
    """Trains any `timm.task.TrainingTask` with Accelerate.

    Under `torchrun` or `accelerate launch` all their processes train together. `fit` creates the run directory and
    writes config.yaml, history.csv, curves.png, exits.png, summary.json, checkpoints/ and the saved models best/ and
    last/; nothing is written before.

    Args:
        task: e.g. `SelfDistillTask`, or timm's `ClassificationTask`.
        train_data: map-style dataset of (image (C, H, W), class index), or the `StreamedImages` of `load_images`. Soft
            labels (K,) that sum to 1 may replace the class index.
        val_data: likewise; every image counts once, and soft labels count as their most likely class.
        config: see `TrainConfig`.

    Raises:
        TypeError: `task` is not a TrainingTask.
        ValueError: a setting cannot work, e.g. fp16 on a CPU, different classes in model and data, or too few images.
        FileExistsError: `config.output` holds another run.
        FileNotFoundError: there is nothing to resume.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillModel, SelfDistillTask, TrainConfig, Trainer
        >>> from timm_selfdistill import wrap_self_distill
        >>> images = [(torch.randn(3, 32, 32), index % 10) for index in range(64)]
        >>> task = SelfDistillTask(wrap_self_distill(timm.create_model("test_resnet", num_classes=10)))
        >>> config = TrainConfig(output="runs/random", epochs=1, batch_size=32, workers=0)
        >>> result = Trainer(task, images, images, config).fit()
        >>> len(result.history)
        1
        >>> model = SelfDistillModel.from_pretrained(result.output / "best")
    """

    def __init__(
        self, task: TrainingTask, train_data: RunImages, val_data: RunImages, config: TrainConfig | None = None
    ):
        config = config or TrainConfig()
        check_task(task)
        check_counts(train_data, val_data)
        train_data, val_data = paired(train_data, "training"), paired(val_data, "validation")
        check_frozen_settings(task, config, train_data, val_data)
        self.accelerator = create_accelerator(config, find_unused=learns_in_parts(task, config))
        self.input_size = image_shape(train_data, config)
        model = eval_model(task)
        classes = check_classes(model, val_data if config.unlabelled else train_data)
        mixer = TargetMixer(config, classes or count_logits(model, self.input_size), smooths=not smooths_labels(task))
        check_first_labels(mixer.num_classes, mixer.mixes, train_data, val_data)
        self.memory = create_memory(task, config, train_data, mixer.num_classes, self.accelerator)
        self.checkpoint = find_resumed(config, self.accelerator)
        images, reserved = image_count(train_data), self.memory.device_bytes if self.memory else 0
        config = find_batch_size(
            self.accelerator, task, mixer, config, self.input_size, images, self.checkpoint, reserved
        )
        if config.lr_base is not None:
            in_update = known_batch_size(config) * config.grad_accum_steps * self.accelerator.num_processes
            config = replace(config, lr=base_lr(config, in_update))
        self.config = config
        self.caches = create_caches(config, train_data, val_data)
        data: Sequence[RunImages] = self.caches or [train_data, val_data]
        self.batches = train_batches(data[0], config, self.accelerator)
        self.val_batches = ValBatches(data[1], config, self.accelerator)
        self.updates_per_epoch = -(-self.batches.epoch_images // self.batches.global_batch // config.grad_accum_steps)
        if isinstance(model, SelfDistillModel):
            model.early_exit = None  # its thresholds belong to the weights before training
        self.state = TrainState(
            self.batches.global_batch,
            self.batches.epoch_images,
            frozen_digest(task),
            name_classes(model, train_data, val_data),
            (getattr(val_data, "source", None) or {}).get("drawn_from") or "",
        )
        self.settings = describe_run(self.accelerator, self.state, config)
        self.update = create_updater(self.accelerator, task, mixer, config, self.updates_per_epoch, self.memory)
        self.epochs = self.update.epochs
        self._check_start()
        check_pushable(config, self.eval_model)
        self.planned_output = check_run(config, self.accelerator, self.checkpoint)
        self.opened: OpenedRun | None = None
        self.interval = Interval(config.checkpoint_interval)
        self.pictures = Interval(PICTURE_INTERVAL)
        self.interrupt = InterruptRequest(self.accelerator)
        self.metrics: list[ExitMetrics] = []
        self.saved = SavedModels(
            self.planned_output or OWN_FOLDER,  # `fit` sets the directory
            config,
            self.accelerator,
            train_data,
            val_data,
            image_shape(val_data, config),
        )
        self.lr = self._lr()

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved: the trained one, or its moving average."""
        return self.update.eval_model

    @property
    def output(self) -> Path | None:
        """The run directory; None before `fit` if it has yet to choose a name."""
        return self.opened.output if self.opened else self.planned_output

    @property
    def run(self) -> OpenedRun:
        """The opened run; available once `fit` has started."""
        if self.opened is None:
            raise RuntimeError("there is no run directory yet; fit creates it")
        return self.opened

    def fit(self) -> TrainResult:
        """Train, evaluate and save. SIGINT, SIGTERM or SIGUSR1 stops training early, with a checkpoint.

        Raises:
            FloatingPointError: the loss became NaN or infinite; the last checkpoint is kept.
            ValueError: the model cannot be saved (checked before the first update), or an image cannot be read.
        """
        with sharing_failures(self.accelerator):
            self.opened = run = self._open_run()
            ended = False
            try:
                self._start()
                summary = self._train()
                ended = True
            except Exception:
                self._draw_missing()  # e.g. of a run that diverged
                raise
            finally:
                upload = self._finish(ended)
        return TrainResult(
            run.output, self.state.history, summary, None if summary else self.interrupt.received, upload
        )

    def _open_run(self) -> OpenedRun:
        """Create the run directory, or reuse that of an earlier `fit`."""
        config, accelerator = self.config, self.accelerator
        if self.opened:
            output, checkpoints = self.opened.output, self.opened.checkpoints
        else:
            output = self.saved.output = open_run(config, accelerator, self.checkpoint)
            checkpoints = Checkpoints(output / "checkpoints", config.checkpoint_hist)
        return OpenedRun(
            output,
            checkpoints,
            create_uploader(config, output, accelerator, self.epochs),
            UpdateProfiler(accelerator, config.profile, output / "profile"),
            ProgressReporter(self.updates_per_epoch * self.epochs, self.state.updates, accelerator.is_main_process),
        )

    def _start(self) -> None:
        """Do everything that precedes the first update."""
        run = self.run
        if self.memory:
            self.memory.open(run.output)
        if self.checkpoint:
            self._resume(self.checkpoint)
            run.progress.resume(self.state.updates)
        if self.accelerator.is_main_process:
            mark_launch(run.output)
        if self.config.report_to:
            run.trackers = RunTrackers(self.accelerator, self.config, run.output, resumed=self.checkpoint is not None)
        if not self.checkpoint:
            self._save_model("last", None)
        if run.uploader:
            run.uploader.start()
        self.update.fix_gradient_order(self.input_size)

    def _finish(self, ended: bool) -> UploadResult | None:
        """Shut down workers, uploads, trackers and background writes.

        Args:
            ended: False if an error ended the run.
        """
        run = self.run
        self.batches.end_workers()
        self.val_batches.end_workers()
        run.checkpoints.wait()
        drop_caches(self.caches, run.output, self.accelerator)
        if self.memory:
            self.memory.close(run.output)
        run.profiler.finish()
        upload = run.uploader.finish(run.progress) if run.uploader else None
        if run.trackers:
            run.trackers.finish()
        trained = self.checkpoint or run.checkpoints.newest or self.state.history
        if not ended and not trained and self.accelerator.is_main_process:
            release_run(run.output)
        return upload

    def _train(self) -> RunSummary | None:
        """Train to the end and return the summary; None if a request to stop came first."""
        run, state = self.run, self.state
        with run.progress, self.interrupt.listening():
            if self.checkpoint:
                run.progress.say(f"resumed {self.checkpoint}: epoch {state.epoch + 1}, update {state.updates}")
            if self.memory:
                run.progress.say(str(self.memory))
            if state.epoch < self.epochs:
                fill_caches(self.caches, self.update, run.output, self.config, run.progress, self.interrupt)
            while state.epoch < self.epochs and not self.interrupt.agreed:
                if self._train_epoch():
                    self._finish_epoch()
            if state.epoch < self.epochs:
                self._save_checkpoint()
                run.checkpoints.wait()
                self._draw_missing()
                return None
        summary = self._summarize()
        if self.accelerator.is_main_process and run.trackers:
            run.trackers.log_pictures(run.output, state.updates)
        if run.uploader:
            run.uploader.push("best", f"Best model of {self.epochs} epochs")
        return summary

    def _resume(self, checkpoint: Path) -> None:
        run = self.run
        restore(
            accelerator=self.accelerator,
            task=self.update.task,
            optimizer=self.update.optimizer,
            batches=self.batches,
            state=self.state,
            settings=self.settings,
            snapshot=read_checkpoint(checkpoint),
            no_resume_opt=self.config.no_resume_opt,
            memory=self.memory.memory if self.memory else None,
        )
        if self.accelerator.is_main_process:
            remove_features(run.output)
            run.checkpoints.set_newer_aside(checkpoint)
            try:
                write_config(self.config, run.output)
                if self.saved.take_over(checkpoint.parent.parent, self.state.epoch):
                    self.state.best_epoch = self.saved.best_epoch or self.state.best_epoch
                    self.state.best_metric = self._best_metric()
                else:
                    self.state.best_metric, self.state.best_epoch = float("-inf"), 0
            except OSError as error:
                warn_unwritten(run.output, error)
        self.update.set_schedule(self._position())
        epochs = {int(row["epoch"]): of_columns(row) for row in self.state.history}
        self.update.repeat_epochs(
            {epoch: self._deciding(metrics) if metrics else None for epoch, metrics in epochs.items()}
        )
        self.accelerator.wait_for_everyone()

    def _best_metric(self) -> float:
        """Return the metric of the best model, by this run's eval_metric, which may have changed on resuming."""
        rows = [row for row in self.state.history if row["epoch"] == self.state.best_epoch]
        return self._signed(of_columns(rows[0])) if rows else self.state.best_metric

    def _signed(self, metrics: list[ExitMetrics]) -> float:
        """Return the eval_metric with the sign that makes higher better."""
        return self._deciding(metrics) * (-1 if self.config.eval_metric == "loss" else 1)

    def evaluate(self) -> list[ExitMetrics]:
        """Return the accuracy of every exit and of the ensemble on the validation data; without labels, their agreement
        with the deepest exit. Call it on every process."""
        return self._measure().metrics

    def _measure(self) -> Evaluation:
        """Evaluate the model, see `evaluate`."""
        labelled = self.saved.val_labelled
        classes = self.update.mixer.num_classes
        batches = (self.update.to_device(x, check_indices(y, classes) if labelled else y) for x, y in self.val_batches)
        cached = any(cache.is_filled for cache in self.caches)
        model = self.update.learned_model if cached else self.eval_model
        metrics, images = measure_exits(model, batches, self.accelerator, labelled)
        unreadable = self._sum(self.val_batches.unreadable)
        if unreadable and self.accelerator.is_main_process:
            warnings.warn(f"{unreadable} validation images cannot be read and are skipped", stacklevel=3)
        return Evaluation(metrics, images)

    def _train_epoch(self) -> bool:
        """Train the rest of the epoch and return whether it is complete; False if a request to stop came first."""
        run, state, config = self.run, self.state, self.config
        self.update.train(state.epoch)
        batches = self.batches.batches(state.epoch, state.images)
        began, first_image, replaced = time.perf_counter(), state.images, 0
        pending: list[tuple[int, Losses]] = []
        while group := list(islice(batches, config.grad_accum_steps)):
            state.updates += 1
            state.images += len(group) * self.batches.global_batch
            self.lr = self._lr()
            losses = self.update(group, state.epoch, state.updates, self._position())
            replaced += sum(int(flags.sum()) for _, _, flags, _ in group)
            if losses is None:
                state.skipped_updates += 1
            else:
                pending.append((state.updates, losses))
            self.rate = (state.images - first_image) / (time.perf_counter() - began)
            run.progress.advance()
            run.profiler.step()
            overdue = self.interrupt.agree(state.updates, self.interval.is_overdue())
            save = overdue or self.interval.is_due(state.updates)
            if save or len(pending) == config.log_interval:
                self._record_losses(pending)
                pending = []
            if self.interrupt.agreed:
                break
            if save and state.images < state.epoch_images:  # at the end of an epoch, only after the evaluation
                state.replaced_samples += self._sum(replaced)
                replaced = 0
                self._save_checkpoint()
        self._record_losses(pending)
        state.replaced_samples += self._sum(replaced)
        return state.images == state.epoch_images

    def _record_losses(self, pending: list[tuple[int, Losses]]) -> None:
        """Fetch the losses of the last updates from the device, average them over the processes, check and log them."""
        if not pending:
            return
        state, names = self.state, list(dict.fromkeys(name for _, losses in pending for name in losses))
        absent = torch.full((), float("nan"), device=self.accelerator.device)
        values = torch.stack([torch.stack([losses.get(name, absent) for name in names]) for _, losses in pending])
        gathered = self.accelerator.gather(values[None]).double().cpu()  # not reduced: keeps the order of summation
        rows = gathered.mean(0).tolist()
        found: dict[str, list[float]] = {name: [] for name in names}
        for (update, losses), row in zip(pending, rows):
            self._check_finite([row[names.index("loss")]], update, "loss")
            present = {name: value for name, value in zip(names, row) if name in losses}
            state.add_losses(present)  # one by one, so that the sum does not depend on the log interval
            for name, value in present.items():
                found[name].append(value)
        means = {name: sum(column) / len(column) for name, column in found.items()}
        self.run.progress.note(state.epoch, self.epochs, means["loss"], self.rate)
        self._track({f"train_{name}": value for name, value in means.items()})

    def _sum(self, number: int) -> int:
        """Return the sum over all processes."""
        return int(self.accelerator.reduce(torch.tensor(number, device=self.accelerator.device), "sum"))

    def _track(self, values: dict[str, float]) -> None:
        if self.run.trackers:
            more = {"lr": self.lr, "images_per_second": self.rate, "memory_gib": memory_gib(self.accelerator.device)}
            self.run.trackers.log({**values, **more}, self.state.updates)

    def _check_finite(self, losses: list[float], update: int, what: str) -> None:
        for loss in losses:
            if not math.isfinite(loss):
                checkpoints = self.run.checkpoints
                checkpoints.wait()
                raise diverged(
                    f"the {what} is {loss} at update {update} (epoch {self.state.epoch + 1})", checkpoints.newest
                )

    def _finish_epoch(self) -> None:
        """Evaluate, record and save, while DataLoader workers already load the next epoch."""
        run, state, accelerator = self.run, self.state, self.accelerator
        is_last = state.epoch + 1 == self.epochs
        if not is_last:
            self.batches.start(state.epoch + 1)
        if accelerator.num_processes > 1:
            reduce = self.config.dist_bn == "reduce"
            distribute_bn(self.update.learned_model, accelerator.num_processes, reduce=reduce)
        if (state.epoch + 1) % self.config.val_interval and not is_last:
            self._finish_unmeasured()
            return
        measured = self._measure()
        self.metrics, self.saved.val_images = measured.metrics, measured.images
        metrics, deciding = measured.metrics, self._deciding(measured.metrics)
        self._check_finite([metric.loss for metric in metrics], state.updates, "validation loss")
        row = state.end_epoch(self.lr, as_columns(metrics))
        self.update.end_epoch(state.epoch, deciding)
        run.progress.say(
            f"epoch {state.epoch}/{self.epochs}  loss {row['train_loss']:.3f}  "
            f"{'top-1' if self.saved.val_labelled else 'agreement with the deepest exit'} "
            + "  ".join(f"{metric.label.replace('_', ' ')} {metric.top1:.2f}" for metric in metrics)
            + f"  {self.rate:,.0f} images/s  left {run.progress.time_left()}"
            + state.left_out_note()
        )
        self._track({key: value for key, value in row.items() if not key.startswith(("epoch", "lr", "train_"))})
        metric = self._signed(metrics)
        self._save_model("last", metrics)
        is_best = metric > state.best_metric or not (run.output / "best").exists()  # e.g. resumed in another directory
        is_best = is_best and self._save_model("best", metrics)
        if is_best:
            state.best_metric, state.best_epoch = metric, state.epoch
        if accelerator.is_main_process:
            report_history(run.output, state.history, self.saved.val_labelled, picture=False)
            if self.pictures.is_overdue() or (run.uploader and run.uploader.pushes(state.epoch, is_best)):
                self._draw_missing()
        self._save_checkpoint()
        if run.uploader:
            run.uploader.finish_epoch(state.epoch, is_best, run.progress)

    def _finish_unmeasured(self) -> None:
        """Move on to the next epoch without a validation."""
        state, progress = self.state, self.run.progress
        row = state.end_epoch(self.lr, {})
        self.update.end_epoch(state.epoch, None)
        progress.say(
            f"epoch {state.epoch}/{self.epochs}  loss {row['train_loss']:.3f}  {self.rate:,.0f} images/s"
            f"  left {progress.time_left()}" + state.left_out_note()
        )

    def _deciding(self, metrics: list[ExitMetrics]) -> float:
        """Return the eval_metric of a validated epoch."""
        frozen = getattr(self.eval_model, "freeze_backbone", False)
        return deciding_metric(metrics, frozen, self.config.eval_metric)

    def _check_start(self) -> None:
        """Set the state to `start_epoch`.

        Raises:
            ValueError: there is no such epoch, or the memory's warmup is too long.
        """
        if self.memory:
            self.memory.check_epochs(self.epochs)
        if self.config.start_epoch >= self.epochs:
            raise ValueError(
                f"start_epoch must be less than the run's {self.epochs} epochs, got {self.config.start_epoch}"
            )
        self.state.epoch = self.config.start_epoch
        self.state.updates = self.state.epoch * self.updates_per_epoch
        if self.state.epoch:
            self.update.set_schedule(self._position())

    def _summarize(self) -> RunSummary:
        """Write summary.json and exits.png on the main process, and return the summary on every process."""
        metrics, output = self.metrics, self.run.output
        if not metrics:  # the run was resumed after its last epoch
            measured = self._measure()
            metrics, self.saved.val_images = measured.metrics, measured.images
        answer: list[Any] = [None]
        if self.accelerator.is_main_process:
            state = self.state
            if "best" in self.saved.save_missing(self.eval_model, state.epoch, metrics):
                state.best_epoch = state.epoch
            report_history(output, state.history, self.saved.val_labelled)
            row = next(row for row in state.history if row["epoch"] == state.best_epoch)
            best = state.best_epoch, of_columns(row)
            answer = [self.saved.summarize(self.eval_model, best, (state.epoch, metrics))]
        return broadcast_object_list(answer)[0]

    def _draw_missing(self) -> None:
        """Draw the plots of the epochs so far."""
        if self.accelerator.is_main_process and self.state.history:
            report_history(self.run.output, self.state.history, self.saved.val_labelled)
            self.saved.draw_missing()
            self.pictures.restart()

    def _save_model(self, name: str, metrics: list[ExitMetrics] | None) -> bool:
        """Save a model on the main process and return whether it was saved."""
        return self.accelerator.is_main_process and self.saved.save(name, self.eval_model, self.state.epoch, metrics)

    def _save_checkpoint(self) -> None:
        snapshot = take_snapshot(
            accelerator=self.accelerator,
            task=self.update.task,
            optimizer=self.update.optimizer,
            batches=self.batches,
            state=self.state,
            settings=self.settings,
            memory=self.memory.memory if self.memory else None,
        )
        if snapshot:
            self.run.checkpoints.write(snapshot, self.state.updates)
        self.interval.restart()

    def _position(self) -> int:
        """Return the position in the schedule: updates done so far, as if all epochs had been as long as this one."""
        state, accumulated = self.state, self.state.global_batch * self.config.grad_accum_steps
        return state.epoch * self.updates_per_epoch + -(-state.images // accumulated)

    def _lr(self) -> float:
        """Return the learning rate of the next update, before layer_decay and head_lr_scale."""
        groups = [(group["lr"], group.get("lr_scale", 1.0)) for group in self.update.optimizer.param_groups]
        return next((lr for lr, scale in groups if scale == 1), groups[0][0] / (groups[0][1] or 1))
