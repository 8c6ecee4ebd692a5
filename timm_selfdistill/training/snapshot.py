"""The state of a run: copied to memory, and put back."""
import random
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .config import TrainConfig
from .frozen import trained_state
from .loading import TrainBatches
from .sharding import gather, spread_optimizer, spread_weights
from .state import TrainState

FIXED_SETTINGS = (
    "seed", "opt", "opt_eps", "opt_betas", "opt_kwargs", "momentum", "weight_decay", "layer_decay",
    "layer_decay_min_scale", "layer_decay_no_opt_scale", "head_lr_scale", "head_warmup_epochs", "model_ema",
    "model", "exits", "head", "teacher", "hint", "t_squared", "bce_loss", "bce_sum",
    "bce_target_thresh", "bce_pos_weight", "freeze_backbone", "unlabelled", "method", "in_chans",
    "img_size", "dataset", "dataset_config", "train_split", "val_split", "val_fraction", "input_key", "target_key",
    "streaming", "num_classes", "start_epoch", "aug_splits", "jsd_loss", "split_bn")
"""A run that is resumed with others would be another run."""
OPTIMIZER_SETTINGS = (
    "opt", "opt_eps", "opt_betas", "opt_kwargs", "momentum", "weight_decay", "layer_decay", "layer_decay_min_scale",
    "layer_decay_no_opt_scale", "head_lr_scale", "lr")
"""Those that may be others where the optimizer's state is left out."""
FREE_SETTINGS = {
    "device", "output", "resume", "workers", "log_interval", "checkpoint_interval", "checkpoint_hist", "report_to",
    "profile",
    "push_to_hub", "hub_model_id", "hub_private", "hub_license", "hub_strategy"}
"""Those that change nothing in the weights, and need no word."""


class Snapshot(NamedTuple):
    """In the memory of the main process; nothing that trains on touches it."""

    weights: dict[str, Tensor]
    """Of what learns in the task, moving average included, under its own names, whatever wraps it."""
    rest: dict[str, Any]
    """Optimizer, loss scale, random states and places in a stream of every process, `TrainState`, settings; what
    torch.load reads with weights_only."""


def plain(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The module under DDP and mixed-precision wrappers."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def take_snapshot(
        accelerator: Accelerator, task: nn.Module, optimizer: AcceleratedOptimizer, batches: TrainBatches,
        state: TrainState, config: TrainConfig) -> Snapshot | None:
    """Copy the state of the run; call it on every process, the main one gets it."""
    random_states, places = zip(*gather_object([(get_random_states(), batches.state_dict())]))
    whole = trained_state(plain(accelerator, task)), optimizer.state_dict()
    weights, optimizer_state = gather(whole, keep=accelerator.is_main_process)
    if not accelerator.is_main_process:
        return None
    rest = {
        "optimizer": optimizer_state,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "random": list(random_states),
        "batches": list(places),
        "state": state.state_dict(),
        "settings": _describe(accelerator, state, config),
    }
    copies = {key: _copy(value).contiguous() for key, value in weights.items()}  # as safetensors takes them
    return Snapshot(copies, tree_map_only(Tensor, _copy, rest))


def restore(
        accelerator: Accelerator, task: nn.Module, optimizer: AcceleratedOptimizer, batches: TrainBatches,
        state: TrainState, config: TrainConfig, snapshot: Snapshot) -> None:
    """Put a state back; processes that the run did not have keep their own random state.

    Raises:
        ValueError: it is that of another run: of other settings, another model or other batches.
    """
    _check_settings(
        snapshot.rest["settings"], _describe(accelerator, state, config), warn=accelerator.is_main_process,
        free=OPTIMIZER_SETTINGS if config.no_resume_opt else ())
    batches.load_state_dicts(snapshot.rest["batches"])
    _load_weights(plain(accelerator, task), snapshot.weights)
    state.load_state_dict(snapshot.rest["state"])
    if not config.no_resume_opt:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.load_state_dict(spread_optimizer(snapshot.rest["optimizer"], parameters))
        if accelerator.scaler and snapshot.rest["scaler"]:
            accelerator.scaler.load_state_dict(snapshot.rest["scaler"])
    if accelerator.process_index < len(snapshot.rest["random"]):
        set_random_states(snapshot.rest["random"][accelerator.process_index])


def _describe(accelerator: Accelerator, state: TrainState, config: TrainConfig) -> dict[str, str]:
    """The settings of a run, and what else it hangs on, as text."""
    facts = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision,
             "images an epoch": state.epoch_images}
    settings = config.to_dict()
    settings.pop("found", None)
    return {key: str(value) for key, value in {**settings, **facts}.items()}


def _check_settings(saved: dict[str, str], own: dict[str, str], warn: bool, free: Collection[str] = ()) -> None:
    """Compare a run's settings with those of its checkpoint.

    Args:
        free: settings that may be others.

    Raises:
        ValueError: they differ in what makes it another run.
    """
    differing = {key: (saved[key], own[key]) for key in own
                 if key in saved and saved[key] != own[key] and key not in FREE_SETTINGS}
    said = {key: f"{key} {before} instead of {now}" for key, (now, before) in differing.items()}
    fixed = {*FIXED_SETTINGS, "lr"} if own["sched"] == "none" else FIXED_SETTINGS
    if refused := [said[key] for key in said if key in fixed and key not in free]:
        raise ValueError(
            f"the checkpoint is of another run, which this one cannot go on with: {', '.join(refused)};"
            " resume with the same settings, or start a new run")
    if said and warn:
        warnings.warn(f"resumed with other settings than before: {', '.join(said.values())}", stacklevel=2)


def _load_weights(task: TrainingTask, saved: dict[str, Tensor]) -> None:
    own = trained_state(task)
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    differing = sorted(
        key for key in shapes.keys() | saved.keys()
        if key not in saved or key not in shapes or tuple(saved[key].shape) != shapes[key])
    if differing:
        raise ValueError(
            f"the checkpoint is of another model: {len(differing)} tensors differ, {differing[0]!r} first;"
            " resume with the model, exits, head, number of classes and model_ema that it was made with")
    task.load_state_dict(spread_weights(saved, own), strict=False)  # without a frozen backbone


def get_random_states() -> dict[str, Any]:
    """Of Python's, numpy's and torch's global generators, on the processor and on this process's GPU."""
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
    """With memory of its own, also where a network holds one tensor under several names (CoaT)."""
    return tensor.detach().to("cpu", copy=True)
