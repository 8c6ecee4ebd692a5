"""Translation of args.yaml, written by timm's train.py, to flags of this package."""

from pathlib import Path
from typing import Any

from timm.optim import get_optimizer_info, list_optimizers

from ..training.config import CYCLIC
from .methods import KD_FLAGS
from .program import say
from .timm_flags import PASSED_OVER, REFUSED

MARKS = {"worker_seeding", "no_prefetcher", "pin_mem", "use_multi_epochs_loader"}
"""Keys that are in every args.yaml and in no other file of flags."""
DEFAULTS = {
    "dataset_download": False,
    "dataset_trust_remote_code": False,
    "torchscript": False,
    "fast_norm": False,
    "no_ddp_bb": False,
    "model_ema_force_cpu": False,
    "save_images": False,
    "tta": 0,
    "train_size_schedule": "constant",
    "train_size_schedule_spread": 0.65,
    "train_size_random_mix": 0.1,
    "variable_batch_loss_scale": "none",
    "naflex_loader": False,
    "naflex_train_seq_lens": [128, 256, 576, 784, 1024],
    "naflex_max_seq_len": 576,
    "naflex_loss_scale": "linear",
    "naflex_patchify_channels_first": False,
    "model_dtype": "float32",
}
"""timm's defaults of the unsupported flags; the others have none."""
UNSET: tuple[object, ...] = (None, [], {})
EMPTY = {
    "dataset",
    "class_map",
    "initial_checkpoint",
    "resume",
    "interpolation",
    "fuser",
    "output",
    "experiment",
    "wandb_resume_id",
    "lr_base_scale",
    "data_dir",
}
"""Keys for which timm treats an empty string as not given."""
CANNOT_BE_EMPTY = {
    "dist_bn": "batch norm statistics are always synchronized between processes; give reduce or broadcast",
    "val_split": "a run always validates; name a split, or leave it out",
}
BCE = ("bce_loss", "bce_sum", "bce_target_thresh", "bce_pos_weight")


def is_timm_file(values: dict[str, Any]) -> bool:
    """Whether the values are from an args.yaml, written by timm's train.py."""
    return len(values.keys() & MARKS) > 1


def translate(values: dict[str, Any], path: Path, known: set[str]) -> dict[str, Any]:
    """Return the flags of this package for the values of an args.yaml, and print which keys have no effect here.

    Args:
        known: names of this package's flags.

    Raises:
        ValueError: a value would change the result and is not supported, or a key is unknown.
    """
    given = {
        name: value for name, value in values.items() if value not in UNSET and not (value == "" and name in EMPTY)
    }
    defaults, idle = {**dict.fromkeys(REFUSED), **DEFAULTS}, _idle(given)
    for name, value in given.items():
        if name in defaults and value != defaults[name] and name not in idle:
            raise ValueError(f"{path}: {name} {value} is not supported: {REFUSED[name]}")
    if given.get("kd_loss_type", "kl") != "kl" and "kd_model_name" in given:
        raise ValueError(f"{path}: kd_loss_type {given['kd_loss_type']} is not supported: timm only has kl")
    for name, reason in CANNOT_BE_EMPTY.items():
        if given.get(name) == "":
            raise ValueError(f"{path}: an empty {name} is not supported: {reason}")
    odd = given.keys() - known - defaults.keys() - PASSED_OVER.keys() - {"data"}
    if unknown := sorted(name for name in odd if given[name] is not False):
        raise ValueError(
            f"{path}: unknown keys, possibly from another version of timm: {', '.join(unknown)}; remove them, or"
            " replace them with flags that do the same"
        )
    passed = [name for name in PASSED_OVER.keys() & given.keys() if given[name] not in (False, 0, "all", "kl")]
    passed += [name for name, says in idle.items() if says] + list(odd)
    if passed:
        say(f"{path}: ignored, since they have no effect here: {', '.join(sorted(passed))}")
    flags = {name: value for name, value in given.items() if name in known and name not in PASSED_OVER | defaults}
    if flags.get("val_split") == "validation":  # timm's default; here the first validation split found
        del flags["val_split"]
    for name in idle:
        flags.pop(name, None)
    if "data" in given:
        flags.setdefault("data_dir", given["data"])
    if not flags.get("lr"):
        flags.pop("lr", None)  # in timm, 0 stands for lr_base
    return {"fit_img_size": False, **flags}


def _idle(given: dict[str, Any]) -> dict[str, bool]:
    """Return the keys that have no effect in timm either, given the other keys, and whether their value is set."""
    idle = {}
    if given.get("device") == "cuda":  # timm's default; here the device that is available
        idle["device"] = False
    if given.get("sched") not in CYCLIC:
        idle["cooldown_epochs"] = bool(given.get("cooldown_epochs"))
    mixes = given.get("mixup") or given.get("cutmix") or "cutmix_minmax" in given
    if not given.get("bce_loss") or not (mixes or given.get("smoothing")):  # timm then uses cross entropy
        idle |= dict.fromkeys(BCE, True)
    info = get_optimizer_info(given["opt"]) if given.get("opt") in list_optimizers() else None
    for name, condition in (
        ("wandb_project", given.get("log_wandb")),
        ("wandb_tags", given.get("log_wandb")),
        ("torchcompile_mode", given.get("torchcompile")),
        ("no_resume_opt", given.get("resume")),
        ("opt_eps", info is None or info.has_eps),
        ("opt_betas", info is None or info.has_betas),
        ("epoch_repeats", str(given.get("dataset", "")).startswith("hfids/")),
        ("train_num_samples", str(given.get("dataset", "")).startswith("hfids/")),
        ("drop_connect", False),
    ):
        if not condition:
            idle[name] = bool(given.get(name))
    if given.get("input_img_mode") == {1: "L", 3: "RGB"}.get(given.get("in_chans", 3)):
        idle["input_img_mode"] = False
    kind = given.get("kd_distill_type", "logit") if "kd_model_name" in given else None
    for name, kinds in {**KD_FLAGS, "kd_distill_type": ("logit", "feature", "token")}.items():
        if kind not in kinds:
            idle[name] = False
    return {name: says and bool(given[name]) for name, says in idle.items() if name in given}
