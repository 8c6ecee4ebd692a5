"""Reading the weights of a saved model or a checkpoint: those of its backbone and of its exits."""
import argparse
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import clean_state_dict, load_state_dict
from timm.utils import load_checkpoint_metadata
from torch import Tensor

from .. import hub
from ..hub.files import BACKBONE, CONFIG, HEADS, check_version
from ..hub.trust import check_exits, check_network, read_json, short
from .checkpoint import CHECKSUM_FILE, find_checkpoint, find_damage

UNREADABLE = (SafetensorError, pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError, TypeError,
              LookupError, AttributeError)
"""Errors that timm and torch raise for files that are not checkpoints."""
TASK, AVERAGE, STUDENT = "trainable_module.", "trainable_module_ema.module.", "student."
"""Prefixes of the weights, and of their moving average, in a checkpoint of a run."""
PARTS = ("backbone.", "heads.")
"""Prefixes in the state dict of a `SelfDistillModel`."""


class SavedWeights(NamedTuple):
    """Weights of a network and its exits, and how the exits were made."""

    source: str
    """Where they were read, for messages."""
    backbone: dict[str, Tensor]
    """Under the names of the timm model; empty where a saved model was given, which timm loads itself."""
    heads: dict[str, Tensor]
    """Under the names of `SelfDistillModel.heads`; empty where there are none."""
    exits: list[int] | None
    """`feature_info` indices of the shallow exits; None where that is not recorded."""
    head: str | None
    """None for a callable, or where that is not recorded."""
    head_args: dict[str, Any]
    config: dict[str, Any]
    """config.json of the saved model that the weights belong to; empty where there is none."""
    averaged: bool = False
    """Whether they are a moving average."""

    @property
    def has_exits(self) -> bool:
        return bool(self.heads or self.exits)

    @property
    def own_head(self) -> bool:
        """Whether the heads were made by a callable."""
        return self.has_exits and self.head is None


def read_weights(path: str | Path) -> SavedWeights:
    """Read a checkpoint; the moving average is taken where there is one.

    Args:
        path: one of

            - a saved model: its folder, or model.safetensors in it;
            - a checkpoint of a run: the folder step-N, or the file in it;
            - a run directory: best/ is read, or the newest checkpoint if there is no best/ yet;
            - any other file with a state dict, such as a checkpoint of timm's training script: .safetensors, or what
              `torch.load` reads with `weights_only=True`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else than weights.
    """
    file = _find_file(Path(path))
    if (file.parent / CHECKSUM_FILE).is_file() and (damage := find_damage(file.parent)):
        raise ValueError(f"{damage}; take another checkpoint")
    state, record = _read_state(file), read_record(file)
    of_run = any(name.startswith(TASK) for name in state)
    state, averaged = _unwrap_task(state)
    backbone, heads = _split(state)
    folder = _model_folder(file, of_run)
    config = _recorded_config(record, file) if folder is None else _read_config(folder)
    if not of_run and "self_distill" in config and file.name == BACKBONE and (file.parent / HEADS).is_file():
        heads = _read_state(file.parent / HEADS)
    if heads and not backbone:  # of a frozen backbone, which is no part of the checkpoint
        backbone = _frozen_backbone(file, folder)
    averaged = averaged or any(record.get(key) is not None for key in ("state_dict_ema", "model_ema"))
    settings = config.get("self_distill") if heads else None
    settings = settings or {"exits": None, "head": _guess_head(heads), "head_args": {}}
    return SavedWeights(str(path), backbone, heads, settings["exits"], settings["head"], settings["head_args"], config,
                        averaged)


def _find_file(path: Path) -> Path:
    if path.is_file():
        if path.name == HEADS:
            raise ValueError(f"{path} holds only the exits; give {path.with_name(BACKBONE)}, whose exits they are")
        return path
    if (path / "best").is_dir():
        path = path / "best"
    elif (path / "checkpoints").is_dir():
        path = find_checkpoint(str(path), "")
    if not (path / BACKBONE).is_file():
        raise FileNotFoundError(
            f"checkpoint {path} is neither a file nor a folder with {BACKBONE}; expected a .safetensors or .pth file, a"
            " saved model, a checkpoint folder or a run directory")
    return path / BACKBONE


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        state = load_state_dict(str(file))
    except UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the checkpoint {file} ({reason}); expected .safetensors, or weights alone as"
                         " torch.load(..., weights_only=True) reads them") from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict: names and tensors")
    return state


def read_record(file: Path) -> dict[str, Any]:
    """What a checkpoint that torch wrote holds beside its weights; tensors stay on disk."""
    content = load_checkpoint_metadata(str(file)) if zipfile.is_zipfile(file) else {}
    return content if isinstance(content, dict) else {}


def _unwrap_task(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The weights of the trained network in a checkpoint of a run, without those that only training needs (see
    `unshared_state_dict`), and whether they are its moving average."""
    state = {name: value for name, value in state.items() if ".aux_bn." not in name}
    own = _part(state, TASK)
    if not own:
        return state, False
    average = _part(state, AVERAGE)
    if any(name.startswith("heads.") for name in own) and not any(name.startswith("heads.") for name in average):
        average = {f"heads.{name}": value for name, value in average.items()}  # a frozen backbone has none
    own = own | average
    return _part(own, STUDENT) or own, bool(average)


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The backbone's weights and the heads'."""
    state = clean_state_dict(state)
    if not all(name.startswith(PARTS) for name in state):
        return state, {}
    return tuple(clean_state_dict(_part(state, part)) for part in PARTS)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _model_folder(file: Path, of_run: bool) -> Path | None:
    """The saved model that a file belongs to: its own folder, or last/ or best/ of the run that made it, in whose
    directory, or checkpoints of which, it lies."""
    if of_run:
        place = file.absolute().parent
        run = place.parent.parent if (place / CHECKSUM_FILE).is_file() else place
        folders = [run / "last", run / "best"]
    else:
        folders = [file.parent] if file.name == BACKBONE else []
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved model; empty where it is another program's."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or "architecture" not in config or "pretrained_cfg" not in config:
        return {}
    if isinstance(config.get("self_distill"), dict):
        config = hub.read_config(folder)
        if config["self_distill"].get("truncated_to") is not None:
            raise ValueError(f"{folder} is a truncated model, which has one exit only; give the whole model")
    check_network(config, folder / CONFIG)
    return config


def _frozen_backbone(file: Path, folder: Path | None) -> dict[str, Tensor]:
    if folder is None:
        raise ValueError(f"{file} holds the exits of a frozen backbone alone, and last/ and best/ of its run are not"
                         " where it lies; give best/ or last/ of that run")
    return _read_state(folder / BACKBONE)


def _recorded_config(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """The content of a config.json in a checkpoint of a `SelfDistillTask`; empty where there is none. How images were
    read is taken from the flags of timm's training script, where it wrote the checkpoint."""
    config = record.get("self_distill")
    if config is None:
        return {}
    try:
        if isinstance(record.get("args"), argparse.Namespace):
            data_config = resolve_data_config(vars(record["args"]), pretrained_cfg=config["pretrained_cfg"])
            config["pretrained_cfg"] |= {key: list(value) if isinstance(value, tuple) else value
                                         for key, value in data_config.items()}
        check_network(config, file)
        check_version(config["self_distill"], file)
        check_exits(config["self_distill"], file)
        if not isinstance(config["self_distill"]["head"], (str, type(None))):
            raise TypeError
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f'{file} is damaged: "self_distill" is {short(config)}; write the checkpoint again') from error
    return config


def _guess_head(heads: dict[str, Tensor]) -> str | None:
    """The kind of heads, by the names of their tensors."""
    parts = {name.split(".")[1] for name in heads if re.fullmatch(r"\d+\.\w+\..+", name)}
    kinds = {"attention": {"attention", "bottleneck", "fc"}, "bottleneck": {"bottleneck", "fc"},
             "linear": {"proj", "fc"}}
    return next((kind for kind, names in kinds.items() if names == parts), None)
