"""The weights that a run begins with: those of a saved model or a checkpoint, exits included."""

import argparse
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import clean_state_dict, load_state_dict, parse_model_name
from timm.utils import load_checkpoint_metadata
from torch import Tensor, nn

from ... import hub
from ...hub.files import BACKBONE, CONFIG, HEADS, check_version
from ...hub.trust import check_exits, check_network, read_json, short
from ...model import SelfDistillModel
from ...stages import Stage
from ...timm_model import as_timm
from ..data.transforms import takes_other_sizes
from ..state.checkpoint import CHECKSUM_FILE, find_checkpoint, find_damage

UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)
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
    return SavedWeights(
        str(path), backbone, heads, settings["exits"], settings["head"], settings["head_args"], config, averaged
    )


def _find_file(path: Path) -> Path:
    if path.is_file():
        if path.name == HEADS:
            raise ValueError(f"{path} holds only the exits; give {path.with_name(BACKBONE)}, whose exits they are")
        return path
    if (path / "best").is_dir():
        path = path / "best"
    elif (path / "checkpoints").is_dir():
        path = find_checkpoint(str(path), "") or path
    if not (path / BACKBONE).is_file():
        raise FileNotFoundError(
            f"checkpoint {path} is neither a file nor a folder with {BACKBONE}; expected a .safetensors or .pth file, a"
            " saved model, a checkpoint folder or a run directory"
        )
    return path / BACKBONE


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        state = load_state_dict(str(file))
    except UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot read the checkpoint {file} ({reason}); expected .safetensors, or weights alone as"
            " torch.load(..., weights_only=True) reads them"
        ) from error
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
    backbone, heads = (clean_state_dict(_part(state, part)) for part in PARTS)
    return backbone, heads


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
        raise ValueError(
            f"{file} holds the exits of a frozen backbone alone, and last/ and best/ of its run are not"
            " where it lies; give best/ or last/ of that run"
        )
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
            config["pretrained_cfg"] |= {
                key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()
            }
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
    kinds = {
        "attention": {"attention", "bottleneck", "proj", "fc"},
        "bottleneck": {"bottleneck", "proj", "fc"},
        "linear": {"proj", "fc"},
    }
    return next((kind for kind, names in kinds.items() if names == parts), None)


PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
SHOWN = 3
"""Tensors that an error names."""


def load_checkpoint(model: nn.Module, path: str | Path, new_classifier: bool = False) -> None:
    """Load the backbone's weights of a checkpoint or a saved model, see `read_weights`: every tensor.

    The model gets the preprocessing of the saved one, too, where it is known, but for the image size; and its class
    names, where its classifier is loaded.

    Args:
        new_classifier: leave the model's own as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is of another network.
    """
    saved = read_weights(path)
    state = dict(saved.backbone)
    if new_classifier:
        own = model.state_dict()
        state |= {name: own[name] for name in _classifier_names(model) if name in own}
    check_fits(model, state, path)
    model.load_state_dict(state)
    known, own_cfg = saved.config.get("pretrained_cfg", {}), as_timm(model).pretrained_cfg
    own_cfg.update({key: known[key] for key in PREPROCESSING if key in known})
    if not new_classifier:
        names = saved.config.get("label_names")
        own_cfg.update(num_classes=as_timm(model).num_classes, **({"label_names": names} if names else {}))


def init_classifier(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Scale the initial weights and bias of a timm model's classifier, and set its bias; None leaves them as they are.

    Raises:
        ValueError: the classifier is no layer with a weight and a bias.
    """
    if scale is None and bias is None:
        return
    layer = as_timm(model).get_classifier()
    if not isinstance(getattr(layer, "bias", None), Tensor):
        raise ValueError(
            f"head_init_scale and head_init_bias are for a classifier with a bias, and"
            f" {type(model).__name__} has {type(layer).__name__}"
        )
    with torch.no_grad():
        if scale is not None:
            layer.weight.mul_(scale)
            layer.bias.mul_(scale)
        if bias is not None:
            layer.bias.fill_(bias)


def check_fits(model: nn.Module, saved: dict[str, Tensor], path: str | Path) -> None:
    """Raise ValueError where weights have other names or shapes than those of a timm model."""
    own = model.state_dict()
    differing = [
        f"{name} {tuple(saved[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in saved and saved[name].shape != value.shape
    ]
    problems = [
        *differing,
        *(f"{name} is missing" for name in own if name not in saved),
        *(f"{name} is unknown" for name in saved if name not in own),
    ]
    if not problems:
        return
    names = _classifier_names(model)
    found = next((saved[name].shape[0] for name in names if name in saved), None)
    if len(problems) == len(differing) and {text.split()[0] for text in differing} <= set(names):
        advice = (
            f"it was made for {found} classes, not {as_timm(model).num_classes}: --num-classes {found} keeps its"
            " classifier, --pretrained-path instead of --initial-checkpoint begins with a new one"
        )
    else:
        advice = "give the --model, --in-chans and --num-classes that it was made with"
    raise ValueError(f"{path} does not fit {type(model).__name__}: {_shorten(problems)}; {advice}")


def _classifier_names(model: nn.Module) -> list[str]:
    classifier = as_timm(model).pretrained_cfg.get("classifier") or ()
    return [
        f"{name}.{part}"
        for name in ([classifier] if isinstance(classifier, str) else classifier)
        for part in ("weight", "bias")
    ]


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def find_saved_weights(
    model: str,
    pretrained: bool,
    initial_checkpoint: str | None,
    pretrained_path: str | None,
) -> SavedWeights | None:
    """The weights that a run begins with, as far as they may have exits; None for a plain timm model's.

    Args:
        model, pretrained, initial_checkpoint, pretrained_path: as of `create_backbone`.

    Raises:
        FileNotFoundError, ValueError: see `read_weights` and `SelfDistillModel.from_pretrained`.
    """
    if checkpoint := initial_checkpoint or pretrained_path:
        return read_weights(checkpoint)
    return read_exits(model) if pretrained else None


def read_exits(name: str) -> SavedWeights | None:
    """The exits of a saved model; None where it has none.

    Args:
        name: local-dir:FOLDER or hf-hub:ID, as timm reads it; any other name has no exits.

    Raises:
        ValueError: the model is a truncated one, or its files are damaged or beyond the limits of `hub/trust.py`.
    """
    place, location = parse_model_name(name)
    if place not in ("local-dir", "hf-hub"):
        return None
    file = find_config(place, location)
    if file is None:
        return None
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("self_distill"), dict):
        return None
    location = location if place == "local-dir" else location.partition("@")[0]
    revision = hub.pin(location, file.parent, None)
    settings = hub.read_config(hub.fetch_model(location, revision=revision, only_config=True))["self_distill"]
    if settings.get("truncated_to") is not None:
        raise ValueError(
            f"{name} is a truncated model, which has one exit only and cannot be trained on here; give the whole model"
        )
    heads = {}
    if settings["head"] is not None:  # else only the callable that made them could load them
        heads = SelfDistillModel.from_pretrained(location, revision=revision).heads.state_dict()
    return SavedWeights(location, {}, heads, settings["exits"], settings["head"], settings["head_args"], config)


def load_exits(
    model: SelfDistillModel, saved: SavedWeights, new_classifiers: bool = False, strict: bool = False
) -> list[str]:
    """Let exits go on with the heads that were trained for them, where they have any; the others stay as they are.

    Args:
        new_classifiers: the network's classes are others than those of the saved one, so no head fits.
        strict: every exit must have one.

    Returns:
        Lines that say which exits go on, which begin anew and why, and which are left out.

    Raises:
        ValueError: `strict`, and an exit has none.
    """
    stages = {stage.index: stage for stage in model.stages}
    exits, guessed = saved.exits, False
    count = len({name.split(".")[0] for name in saved.heads})
    if exits is None and count == len(stages):
        exits, guessed = list(stages), True
    kept: list[Stage] = []
    anew: dict[str, list[Stage]] = {}
    for position, stage in enumerate(model.stages):
        if reason := _why_anew(model, stage, position, saved, exits, new_classifiers):
            if strict:
                raise ValueError(f"the exit at {stage.name} cannot be loaded: {reason}")
            anew.setdefault(reason, []).append(stage)
            continue
        model.heads[position].load_state_dict(_head_state(saved, (exits or []).index(stage.index)))
        kept.append(stage)
    lines = [f"{_exits(kept, 'goes', 'go')} on with the heads of {saved.source}"] if kept else []
    if kept and guessed:
        lines.append(
            f"{saved.source} does not record which exits its {count} heads belong to: taken for those of"
            f" {_names(kept)}; other --exits may be right"
        )
    lines += [f"{_exits(group, 'begins', 'begin')} anew: {reason}" for reason, group in anew.items()]
    if left_out := [index for index in exits or [] if index not in stages]:
        names = ", ".join(model.backbone.feature_info[index]["module"] for index in left_out)
        lines.append(f"trained exits of {saved.source} left out: {names}")
    return lines


def _why_anew(
    model: SelfDistillModel,
    stage: Stage,
    position: int,
    saved: SavedWeights,
    exits: list[int] | None,
    new_classifiers: bool,
) -> str | None:
    """Why an exit cannot go on; None where it can."""
    if new_classifiers:
        return f"the classifiers are new, those of {saved.source} are for other classes"
    if saved.own_head:
        return (
            f"the heads of {saved.source} are none of this version: they were made by a callable, whose code is never"
            " loaded, or by another version of timm-selfdistill"
        )
    if model.head != saved.head:
        return f"{saved.source} has {saved.head or 'unknown'} heads, this model has {model.head} heads"
    if exits is None:
        count = len({name.split(".")[0] for name in saved.heads})
        return f"{saved.source} has {count} heads without a record of their exits; give as many --exits"
    if stage.index not in exits:
        return f"{saved.source} has no exit there"
    own, state = model.heads[position].state_dict(), _head_state(saved, exits.index(stage.index))
    for name in sorted(own.keys() | state.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (own, state)]
        if shapes[0] != shapes[1]:
            return f"{name} of the head is {shapes[1] or 'missing'} in {saved.source}, {shapes[0] or 'missing'} here"
    return None


def _head_state(saved: SavedWeights, position: int) -> dict[str, Any]:
    prefix = f"{position}."
    return {name.removeprefix(prefix): value for name, value in saved.heads.items() if name.startswith(prefix)}


def find_config(place: str, location: str) -> Path | None:
    """config.json of a model under the name that timm has for it; None where there is none.

    timm has looked for it already, so from the Hub it is in the cache.

    Args:
        place, location: as of `timm.models.parse_model_name`; a location on the Hub may end in "@" and a revision.
    """
    if place == "hf-hub":
        name, _, revision = location.partition("@")
        return Path(hf_hub_download(name, CONFIG, revision=revision or None))
    path = Path(location) / CONFIG
    return path if path.is_file() else None


def _exits(stages: list[Stage], one: str, several: str) -> str:
    return f"the exit{'s' * (len(stages) > 1)} at {_names(stages)} {one if len(stages) == 1 else several}"


def _names(stages: list[Stage]) -> str:
    return ", ".join(stage.name for stage in stages)


def create_backbone(
    name: str,
    img_size: int | None = None,
    initial_checkpoint: str | None = None,
    pretrained_path: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """`timm.create_model`, with `img_size` pixels from the beginning where the model can only be made for them.

    Args:
        initial_checkpoint: checkpoint or saved model whose tensors to load, all of them; see `load_checkpoint`.
        pretrained_path: likewise, but with a new classifier.
        kwargs: further arguments of `timm.create_model`.
    """
    if initial_checkpoint and pretrained_path:
        raise ValueError("initial_checkpoint and pretrained_path are two ways to load a checkpoint; give one of them")
    model = _create_for_size(name, img_size, **kwargs)
    if initial_checkpoint:
        load_checkpoint(model, initial_checkpoint)
    elif pretrained_path:
        load_checkpoint(model, pretrained_path, new_classifier=True)
    return model


def _create_for_size(name: str, img_size: int | None, **kwargs: Any) -> nn.Module:
    model = as_timm(timm.create_model(name, **kwargs))
    channels, *size = model.pretrained_cfg["input_size"]
    if img_size is None or size == [img_size, img_size] or takes_other_sizes(model):
        return model
    try:
        model = as_timm(timm.create_model(name, img_size=img_size, **kwargs))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return model  # `model_data_config` says that it takes no other size
    model.pretrained_cfg["input_size"] = (channels, img_size, img_size)
    return model
