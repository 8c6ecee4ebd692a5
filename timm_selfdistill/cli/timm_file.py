"""args.yaml of a run of timm's train.py, as flags of this package."""
from pathlib import Path
from typing import Any

from ..training.config import CYCLIC
from .methods import KD_FLAGS
from .program import say
from .timm_flags import PASSED_OVER, REFUSED

MARKS = {"worker_seeding", "no_prefetcher", "pin_mem", "use_multi_epochs_loader"}
"""Keys of every args.yaml, and of no other file of flags."""
DEFAULTS = {
    "dataset_download": False, "dataset_trust_remote_code": False, "torchscript": False, "fast_norm": False,
    "no_ddp_bb": False, "model_ema_force_cpu": False, "save_images": False, "tta": 0,
    "train_size_schedule": "constant", "train_size_schedule_spread": 0.65,
    "train_size_random_mix": 0.1, "variable_batch_loss_scale": "none", "naflex_loader": False,
    "naflex_train_seq_lens": [128, 256, 576, 784, 1024], "naflex_max_seq_len": 576, "naflex_loss_scale": "linear",
    "naflex_patchify_channels_first": False, "model_dtype": "float32"}
"""Of timm, for the flags that are refused; the others have none."""
UNSET = (None, "", [], {})


def is_timm_file(values: dict[str, Any]) -> bool:
    """Whether timm's train.py wrote it."""
    return values.keys() >= MARKS


def translate(values: dict[str, Any], path: Path, known: set[str]) -> dict[str, Any]:
    """The flags of this package for the values of an args.yaml; a line names what changes nothing here.

    Args:
        known: names of this package's flags.

    Raises:
        ValueError: a value would change the result and cannot be done, or a key is not known.
    """
    given = {name: value for name, value in values.items() if value not in UNSET}
    defaults = {**dict.fromkeys(REFUSED), **DEFAULTS}
    for name, value in given.items():
        if name in defaults and value != defaults[name]:
            raise ValueError(f"{path}: {name} {value} cannot be done: {REFUSED[name]}")
    if unknown := sorted(given.keys() - known - defaults.keys() - PASSED_OVER.keys() - {"data"}):
        raise ValueError(f"{path}: unknown here, as flags of another version of timm may be: {', '.join(unknown)};"
                         " remove them, or give flags that do the same")
    passed = [name for name in PASSED_OVER.keys() & given.keys() if given[name] not in (False, 0, "all", "kl")]
    passed += [name for name, changes in _idle(given).items() if changes]
    if passed:
        say(f"{path}: passed over, since they change nothing here: {', '.join(sorted(passed))}")
    flags = {name: value for name, value in given.items() if name in known and name not in PASSED_OVER | defaults}
    if flags.get("val_split") == "validation":  # timm's default; here the first validation split that there is
        del flags["val_split"]
    for name in _idle(given):
        flags.pop(name, None)
    if "data" in given:
        flags.setdefault("data_dir", given["data"])
    if "kd_model_name" in flags:
        flags["method"] = "kd"
    return flags


def _idle(given: dict[str, Any]) -> dict[str, bool]:
    """What changes nothing in timm either, beside the others that are given; and whether it says something at all."""
    idle = {}
    if given.get("device") == "cuda":  # timm's default; here what there is
        idle["device"] = False
    if given.get("sched") not in CYCLIC:
        idle["cooldown_epochs"] = bool(given.get("cooldown_epochs"))
    kind = given.get("kd_distill_type", "logit") if "kd_model_name" in given else None
    for name, kinds in {**KD_FLAGS, "kd_distill_type": ("logit", "feature", "token")}.items():
        if kind not in kinds:
            idle[name] = False
    return {name: says for name, says in idle.items() if name in given}
