"""The state of a run: how it is copied to memory and restored."""

import random
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from timm.task import TrainingTask
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...memory import AnswerMemory
from ...task import FrozenBackboneTask, learned_state
from ..config import TrainConfig
from ..data.labels import listed
from ..data.loaders import TrainBatches
from ..data.sampling import DRAWS

HistoryRow: TypeAlias = dict[str, float]
"""A row of history.csv: epoch (from 1), lr, the train_ losses, and top1_, top5_ and loss_ of each exit."""


@dataclass
class TrainState:
    """Progress of a run, stored in its checkpoints."""

    global_batch: int
    """Images per forward pass, over all processes."""
    epoch_images: int
    """Images per epoch."""
    backbone: str = ""
    """SHA-256 of a frozen backbone or a teacher, which checkpoints do not contain."""
    class_names: list[str] = field(default_factory=list)
    """Class names in the order of the class indices; empty if unknown."""
    drawn_from: str = ""
    """Fingerprint of the images that the validation images were drawn from; empty if they were not drawn."""
    epoch: int = 0
    images: int = 0
    """Images of this epoch processed so far, over all processes."""
    updates: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Sums of the losses over the updates of this epoch."""
    loss_updates: dict[str, int] = field(default_factory=dict)
    """Number of updates in each sum: a task may return a loss in only some of them."""
    replaced_samples: int = 0
    """Images that could not be read and were replaced by others."""
    skipped_updates: int = 0
    """Updates skipped because their gradients were not finite."""
    best_metric: float = float("-inf")
    """Metric of the best model so far; the negative of a loss."""
    best_epoch: int = 0
    """Epoch of the best model, from 1; 0 if there is none yet."""
    draws: str = DRAWS
    history: list[HistoryRow] = field(default_factory=list)

    def left_out_note(self) -> str:
        """Return the numbers of replaced images and skipped updates, for the progress line of an epoch."""
        return (f"  images replaced {self.replaced_samples}" if self.replaced_samples else "") + (
            f"  updates skipped {self.skipped_updates}" if self.skipped_updates else ""
        )

    def add_losses(self, losses: dict[str, float]) -> None:
        """Add the losses of one update."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
            self.loss_updates[name] = self.loss_updates.get(name, 0) + 1

    def end_epoch(self, lr: float, measured: dict[str, float]) -> HistoryRow:
        """Move on to the next epoch and return the history row of this one.

        Args:
            lr: learning rate of its last update.
            measured: columns of its metrics; empty if the epoch was not validated.

        Raises:
            FloatingPointError: all of its updates were skipped.
        """
        if not self.losses:
            raise FloatingPointError(f"no update of epoch {self.epoch + 1} had finite gradients; try a lower lr")
        row: HistoryRow = {"epoch": self.epoch + 1, "lr": lr}
        row |= {f"train_{name}": total / self.loss_updates[name] for name, total in self.losses.items()}
        row |= measured
        self.history.append(row)
        self.epoch, self.images, self.losses = self.epoch + 1, 0, {}
        self.loss_updates = {}
        return row

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Raises:
            ValueError: frozen backbone, teacher, classes or images differ from those of the checkpoint, or it is from
                the middle of an epoch with other batches.
        """
        before = state.get("backbone", "")
        if bool(before) != bool(self.backbone):
            which = (
                "a teacher or a frozen backbone, but this run has none"
                if before
                else ("neither a teacher nor a frozen backbone, but this run has one")
            )
            raise ValueError(f"the checkpoint is from a run with {which}; resume with the settings of that run")
        if before != self.backbone:
            raise ValueError(
                "the checkpoint is from a run whose teacher or frozen backbone had different weights; resume with the"
                " model, teacher and pretrained weights of that run"
            )
        names = state.get("class_names")
        if names and self.class_names and names != self.class_names:
            raise ValueError(
                f"the checkpoint is from a run on {listed(names, self.class_names)}, but the images have"
                f" {listed(self.class_names, names)}; resume with the classes of that run"
            )
        if state.get("drawn_from") and self.drawn_from and state["drawn_from"] != self.drawn_from:
            raise ValueError(
                "names, labels or number of the images have changed since the run started, so the validation images"
                " would be drawn anew, and the run has trained on most of them; restore the images, or start a new run"
            )
        if state["images"] and state.get("draws") != DRAWS:
            raise ValueError(
                "the checkpoint is from the middle of an epoch, for which an older version of timm-selfdistill ordered"
                " the images differently; resume from a checkpoint at the end of an epoch"
            )
        saved, own = ((place["global_batch"], place["epoch_images"]) for place in (state, vars(self)))
        if state["images"] and saved != own:
            raise ValueError(
                f"the checkpoint is from the middle of an epoch of {saved[1]} images in batches of {saved[0]}"
                f" (batch_size times processes), but this run has {own[1]} images in batches of {own[0]}; resume with"
                " the same numbers"
            )
        own_names = self.class_names or names or []
        vars(self).update(state, global_batch=own[0], epoch_images=own[1], draws=DRAWS, class_names=own_names)


def diverged(what: str, newest: Path | None) -> FloatingPointError:
    """Return the error of a run that diverged.

    Args:
        newest: the newest checkpoint.
    """
    kept = f"{newest} is kept" if newest else "there is no checkpoint yet"
    return FloatingPointError(f"{what}; {kept}; try a lower lr, clip_grad, or bfloat16 instead of float16")


FIXED_SETTINGS = (
    "seed",
    "opt",
    "opt_eps",
    "opt_betas",
    "opt_kwargs",
    "momentum",
    "weight_decay",
    "layer_decay",
    "layer_decay_min_scale",
    "layer_decay_no_opt_scale",
    "head_lr_scale",
    "head_warmup_epochs",
    "model_ema",
    "model",
    "exits",
    "head",
    "teacher",
    "memory_topk",
    "hint",
    "t_squared",
    "bce_loss",
    "bce_sum",
    "bce_target_thresh",
    "bce_pos_weight",
    "freeze_backbone",
    "unlabelled",
    "method",
    "in_chans",
    "img_size",
    "dataset",
    "dataset_config",
    "train_split",
    "val_split",
    "val_fraction",
    "input_key",
    "target_key",
    "streaming",
    "num_classes",
    "start_epoch",
    "aug_splits",
    "jsd_loss",
    "split_bn",
    "kd_distill_type",
)
"""Settings that must not change when a run is resumed."""
OPTIMIZER_SETTINGS = (
    "opt",
    "opt_eps",
    "opt_betas",
    "opt_kwargs",
    "momentum",
    "weight_decay",
    "layer_decay",
    "layer_decay_min_scale",
    "layer_decay_no_opt_scale",
    "head_lr_scale",
    "lr",
)
"""Settings that may change if the optimizer's state is not restored."""
FREE_SETTINGS = {
    "device",
    "output",
    "resume",
    "workers",
    "log_interval",
    "checkpoint_interval",
    "checkpoint_hist",
    "report_to",
    "profile",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "hub_license",
    "hub_strategy",
}
"""Settings that do not affect the weights; changes are not reported."""


class Snapshot(NamedTuple):
    """Copy of a run's state in the memory of the main process, independent of further training."""

    weights: dict[str, Tensor]
    """Trained weights of the task and their moving average, under the task's own names without any wrapper."""
    rest: dict[str, Any]
    """Optimizer, loss scale, random states and stream positions of every process, `TrainState`, and settings; loadable
    with torch.load and weights_only."""
    memory: dict[str, Tensor] | None = None
    """The memory of answers, for a run that has one."""


def take_snapshot(
    accelerator: Accelerator,
    task: TrainingTask,
    optimizer: AcceleratedOptimizer,
    batches: TrainBatches,
    state: TrainState,
    settings: dict[str, str],
    memory: AnswerMemory | None = None,
) -> Snapshot | None:
    """Copy the state of the run; call it on every process.

    Args:
        settings: as returned by `describe_run`.
        memory: the same on every process.

    Returns:
        The snapshot on the main process, None on the others.
    """
    random_states, places = zip(*gather_object([(get_random_states(), batches.state_dict())]))
    if not accelerator.is_main_process:
        return None
    rest = {
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "random": list(random_states),
        "batches": list(places),
        "state": state.state_dict(),
        "settings": settings,
    }
    weights = learned_state(task)
    copies = {key: _copy(value).contiguous() for key, value in weights.items()}  # as safetensors requires
    answers = {key: _copy(value) for key, value in memory.state_dict().items()} if memory else None
    return Snapshot(copies, tree_map_only(Tensor, _copy, rest), answers)


def restore(
    accelerator: Accelerator,
    task: TrainingTask,
    optimizer: AcceleratedOptimizer,
    batches: TrainBatches,
    state: TrainState,
    settings: dict[str, str],
    snapshot: Snapshot,
    no_resume_opt: bool = False,
    memory: AnswerMemory | None = None,
) -> None:
    """Restore a state; processes that the saved run did not have keep their own random state.

    Args:
        settings: as returned by `describe_run`.
        no_resume_opt: do not restore the optimizer.
        memory: the memory of answers in this process, for a run that has one.

    Raises:
        ValueError: the snapshot is from a different run: its settings, model or batches differ.
    """
    _check_settings(
        snapshot.rest["settings"],
        settings,
        warn=accelerator.is_main_process,
        free=OPTIMIZER_SETTINGS if no_resume_opt else (),
    )
    _load_memory(memory, snapshot.memory)
    batches.load_state_dicts(snapshot.rest["batches"])
    _load_weights(task, snapshot.weights)
    state.load_state_dict(snapshot.rest["state"])
    if not no_resume_opt:
        optimizer.load_state_dict(snapshot.rest["optimizer"])
        if accelerator.scaler and snapshot.rest["scaler"]:
            accelerator.scaler.load_state_dict(snapshot.rest["scaler"])
    if accelerator.process_index < len(snapshot.rest["random"]):
        set_random_states(snapshot.rest["random"][accelerator.process_index])


def describe_run(accelerator: Accelerator, state: TrainState, config: TrainConfig) -> dict[str, str]:
    """Return the settings of a run, and what else it depends on, as text, to be stored in checkpoints."""
    facts = {
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "images an epoch": state.epoch_images,
    }
    settings = config.to_dict()
    settings.pop("found", None)
    return {key: str(value) for key, value in {**settings, **facts}.items()}


def _check_settings(saved: dict[str, str], own: dict[str, str], warn: bool, free: Collection[str] = ()) -> None:
    """Compare a run's settings with those of its checkpoint.

    Args:
        free: settings that may differ.

    Raises:
        ValueError: a setting differs that must not change.
    """
    differing = {
        key: (saved[key], own[key])
        for key in own
        if key in saved and saved[key] != own[key] and key not in FREE_SETTINGS
    }
    said = {key: f"{key} {before} instead of {now}" for key, (now, before) in differing.items()}
    fixed = {*FIXED_SETTINGS, "lr"} if own["sched"] == "none" else FIXED_SETTINGS
    if refused := [said[key] for key in said if key in fixed and key not in free]:
        raise ValueError(
            f"the checkpoint is from a run with other settings, which cannot change: {', '.join(refused)};"
            " resume with the same settings, or start a new run"
        )
    if said and warn:
        warnings.warn(f"resumed with different settings: {', '.join(said.values())}", stacklevel=2)


def _load_memory(memory: AnswerMemory | None, saved: dict[str, Tensor] | None) -> None:
    if memory and saved:
        memory.load_state_dict(saved)
    elif memory or saved:
        had, has = ("a memory of answers", "none") if saved else ("no memory of answers", "one")
        raise ValueError(
            f"the checkpoint is from a run with {had}, but this run has {has}; resume with the teacher of that run"
        )


HEADS_BEFORE = r"^(trainable_module_ema\.module\.)(\d+\.)"
"""Names of the averaged heads beside a frozen backbone, in checkpoints of the first versions."""


def _load_weights(task: TrainingTask, saved: dict[str, Tensor]) -> None:
    own = learned_state(task)
    if isinstance(task, FrozenBackboneTask):
        saved = {re.sub(HEADS_BEFORE, r"\1heads.\2", name): value for name, value in saved.items()}
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    differing = sorted(
        key
        for key in shapes.keys() | saved.keys()
        if key not in saved or key not in shapes or tuple(saved[key].shape) != shapes[key]
    )
    if differing:
        raise ValueError(
            f"the checkpoint is from a different model: {len(differing)} tensors differ, {differing[0]!r} first;"
            " resume with the same model, exits, head, number of classes, model_ema and version of timm-selfdistill"
        )
    task.load_state_dict(saved, strict=False)  # a frozen backbone is not in it


def get_random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators, on the CPU and on this process's GPU."""
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    numpy_state = states["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    random.setstate(states["python"])
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to CPU memory of its own, even if a network has it under several names (CoaT)."""
    return tensor.detach().to("cpu", copy=True)
