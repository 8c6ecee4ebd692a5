"""Loading of initial weights from a saved model or a checkpoint, exits included."""

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
"""Prefixes in a checkpoint of a run: of the weights, of their moving average, and of the student within a task."""
PARTS = ("backbone.", "heads.")
"""Prefixes in the state dict of a `SelfDistillModel`."""


class SavedWeights(NamedTuple):
    """Weights of a network and its exits, and how the exits were created."""

    source: str
    """Where the weights were read from, for messages."""
    backbone: dict[str, Tensor]
    """Weights under the names of the timm model; empty for a saved model, which timm loads itself."""
    heads: dict[str, Tensor]
    """Weights under the names of `SelfDistillModel.heads`; empty if there are none."""
    exits: list[int] | None
    """`feature_info` indices of the exits before the deepest; None if not recorded."""
    head: str | None
    """Kind of the heads; None for a callable, or if not recorded."""
    head_args: dict[str, Any]
    config: dict[str, Any]
    """config.json of the saved model that the weights belong to; empty if there is none."""
    averaged: bool = False
    """Whether the weights are a moving average."""

    @property
    def has_exits(self) -> bool:
        return bool(self.heads or self.exits)

    @property
    def own_head(self) -> bool:
        """Whether the heads were created by a callable."""
        return self.has_exits and self.head is None


def read_weights(path: str | Path) -> SavedWeights:
    """Read a checkpoint, and from it the moving average if there is one.

    Args:
        path: one of

            - a saved model: its folder, or model.safetensors in it;
            - a checkpoint of a run: the folder step-N, or the file in it;
            - a run directory: best/ is read, or the newest checkpoint if there is no best/ yet;
            - any other file with a state dict, such as a checkpoint of timm's train.py: .safetensors, or what
              `torch.load` reads with `weights_only=True`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or holds something other than weights.
    """
    file = _find_file(Path(path))
    if (file.parent / CHECKSUM_FILE).is_file() and (damage := find_damage(file.parent)):
        raise ValueError(f"{damage}; use another checkpoint")
    state, record = _read_state(file), read_record(file)
    of_run = any(name.startswith(TASK) for name in state)
    state, averaged = _unwrap_task(state)
    backbone, heads = _split(state)
    folder = _model_folder(file, of_run)
    config = _recorded_config(record, file) if folder is None else _read_config(folder)
    if not of_run and "self_distill" in config and file.name == BACKBONE and (file.parent / HEADS).is_file():
        heads = _read_state(file.parent / HEADS)
    if heads and not backbone:  # a frozen backbone is not part of the checkpoint
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
            raise ValueError(f"{path} holds only the exits; give {path.with_name(BACKBONE)}, to which they belong")
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
            f"cannot read the checkpoint {file} ({reason}); expected .safetensors, or a file that"
            " torch.load(..., weights_only=True) can read"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} does not contain a state dict (names and tensors)")
    return state


def read_record(file: Path) -> dict[str, Any]:
    """Return what a checkpoint written by torch.save contains besides the weights, without loading tensors."""
    content = load_checkpoint_metadata(str(file)) if zipfile.is_zipfile(file) else {}
    return content if isinstance(content, dict) else {}


def _unwrap_task(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the weights of the trained network in a checkpoint of a run, without those that only training needs (see
    `unshared_state_dict`), and whether they are the moving average."""
    state = {name: value for name, value in state.items() if ".aux_bn." not in name}
    own = _part(state, TASK)
    if not own:
        return state, False
    average = _part(state, AVERAGE)
    if any(name.startswith("heads.") for name in own) and not any(name.startswith("heads.") for name in average):
        average = {f"heads.{name}": value for name, value in average.items()}  # a frozen backbone has no average
    own = own | average
    return _part(own, STUDENT) or own, bool(average)


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into the weights of the backbone and of the heads."""
    state = clean_state_dict(state)
    if not all(name.startswith(PARTS) for name in state):
        return state, {}
    backbone, heads = (clean_state_dict(_part(state, part)) for part in PARTS)
    return backbone, heads


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _model_folder(file: Path, of_run: bool) -> Path | None:
    """Return the saved model that a file belongs to: its own folder, or last/ or best/ of the run it was written by;
    None if there is none.

    Args:
        of_run: whether the file is a checkpoint of a run.
    """
    if of_run:
        place = file.absolute().parent
        run = place.parent.parent if (place / CHECKSUM_FILE).is_file() else place
        folders = [run / "last", run / "best"]
    else:
        folders = [file.parent] if file.name == BACKBONE else []
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a saved model; empty if another program wrote it."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or "architecture" not in config or "pretrained_cfg" not in config:
        return {}
    if isinstance(config.get("self_distill"), dict):
        config = hub.read_config(folder)
        if config["self_distill"].get("truncated_to") is not None:
            raise ValueError(f"{folder} is a truncated model with only one exit; give the full model")
    check_network(config, folder / CONFIG)
    return config


def _frozen_backbone(file: Path, folder: Path | None) -> dict[str, Tensor]:
    if folder is None:
        raise ValueError(
            f"{file} holds only the exits of a frozen backbone, and last/ and best/ of its run are not beside it; give"
            " best/ or last/ of that run"
        )
    return _read_state(folder / BACKBONE)


def _recorded_config(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the config.json stored in a checkpoint of a `SelfDistillTask`; empty if there is none. If timm's train.py
    wrote the checkpoint, the preprocessing comes from its flags."""
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
    """Guess the kind of heads from the names of their tensors."""
    parts = {name.split(".")[1] for name in heads if re.fullmatch(r"\d+\.\w+\..+", name)}
    kinds = {
        "attention": {"attention", "bottleneck", "proj", "fc"},
        "bottleneck": {"bottleneck", "proj", "fc"},
        "linear": {"proj", "fc"},
    }
    return next((kind for kind, names in kinds.items() if names == parts), None)


PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
SHOWN = 3
"""Number of tensors listed in an error."""


def load_checkpoint(model: nn.Module, path: str | Path, new_classifier: bool = False) -> None:
    """Load the backbone's weights from a checkpoint or a saved model (see `read_weights`); every tensor must match.

    The preprocessing of the saved model is also copied if it is known, except for the image size, and so are its class
    names if its classifier is loaded.

    Args:
        new_classifier: keep the model's own classifier.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, or does not fit the model.
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
    """Scale the initial weights and bias of a timm model's classifier, and set its bias; None leaves them unchanged.

    Raises:
        ValueError: the classifier is not a layer with a weight and a bias.
    """
    if scale is None and bias is None:
        return
    layer = as_timm(model).get_classifier()
    if not isinstance(getattr(layer, "bias", None), Tensor):
        raise ValueError(
            f"head_init_scale and head_init_bias need a classifier with a bias, but"
            f" {type(model).__name__} has {type(layer).__name__}"
        )
    with torch.no_grad():
        if scale is not None:
            layer.weight.mul_(scale)
            layer.bias.mul_(scale)
        if bias is not None:
            layer.bias.fill_(bias)


def check_fits(model: nn.Module, saved: dict[str, Tensor], path: str | Path) -> None:
    """Raise ValueError if names or shapes of the weights differ from those of a timm model."""
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
            f"it has {found} classes, not {as_timm(model).num_classes}: --num-classes {found} keeps its"
            " classifier, --pretrained-path instead of --initial-checkpoint starts with a new one"
        )
    else:
        advice = "give the --model, --in-chans and --num-classes that it was created with"
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
    """Return the initial weights of a run if they may include exits; None for a plain timm model.

    Args:
        model, pretrained, initial_checkpoint, pretrained_path: as in `create_backbone`.

    Raises:
        FileNotFoundError, ValueError: see `read_weights` and `SelfDistillModel.from_pretrained`.
    """
    if checkpoint := initial_checkpoint or pretrained_path:
        return read_weights(checkpoint)
    return read_exits(model) if pretrained else None


def read_exits(name: str) -> SavedWeights | None:
    """Read the exits of a saved model; None if it has none.

    Args:
        name: local-dir:FOLDER or hf-hub:ID, as in timm; any other name has no exits.

    Raises:
        ValueError: the model is truncated, or its files are damaged or exceed the limits of `hub/trust.py`.
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
            f"{name} is a truncated model with only one exit, which cannot be trained further; give the full model"
        )
    heads = {}
    if settings["head"] is not None:  # a callable's heads could only be loaded by that callable
        heads = SelfDistillModel.from_pretrained(location, revision=revision).heads.state_dict()
    return SavedWeights(location, {}, heads, settings["exits"], settings["head"], settings["head_args"], config)


def load_exits(
    model: SelfDistillModel, saved: SavedWeights, new_classifiers: bool = False, strict: bool = False
) -> list[str]:
    """Load the saved heads into the exits that they were trained for; other exits keep their random initialization.

    Args:
        new_classifiers: whether the network has other classes than the saved one, so that no head fits.
        strict: whether every exit must find its head.

    Returns:
        Lines that say which exits are loaded, which are initialized randomly and why, and which are not used.

    Raises:
        ValueError: `strict` is set and an exit cannot be loaded.
    """
    stages = {stage.index: stage for stage in model.stages}
    exits, guessed = saved.exits, False
    count = len({name.split(".")[0] for name in saved.heads})
    if exits is None and count == len(stages):
        exits, guessed = list(stages), True
    kept: list[Stage] = []
    fresh: dict[str, list[Stage]] = {}
    for position, stage in enumerate(model.stages):
        if reason := _why_not_loaded(model, stage, position, saved, exits, new_classifiers):
            if strict:
                raise ValueError(f"the exit at {stage.name} cannot be loaded: {reason}")
            fresh.setdefault(reason, []).append(stage)
            continue
        model.heads[position].load_state_dict(_head_state(saved, (exits or []).index(stage.index)))
        kept.append(stage)
    lines = [f"loaded the heads of {saved.source} for {_exits(kept)}"] if kept else []
    if kept and guessed:
        lines.append(
            f"{saved.source} does not record where its {count} heads belong; they are assumed to belong to"
            f" {_names(kept)}: if that is wrong, give --exits"
        )
    lines += [f"random initialization for {_exits(group)}: {reason}" for reason, group in fresh.items()]
    if left_out := [index for index in exits or [] if index not in stages]:
        names = ", ".join(model.backbone.feature_info[index]["module"] for index in left_out)
        lines.append(f"trained exits of {saved.source} not used: {names}")
    return lines


def _why_not_loaded(
    model: SelfDistillModel,
    stage: Stage,
    position: int,
    saved: SavedWeights,
    exits: list[int] | None,
    new_classifiers: bool,
) -> str | None:
    """Return why the head of an exit cannot be loaded; None if it can."""
    if new_classifiers:
        return f"the classifiers are new, those of {saved.source} are for other classes"
    if saved.own_head:
        return (
            f"the heads of {saved.source} are of a kind unknown to this version: they were created by a callable, whose"
            " code is never loaded, or by another version of timm-selfdistill"
        )
    if model.head != saved.head:
        return f"{saved.source} has {saved.head or 'unknown'} heads, this model has {model.head} heads"
    if exits is None:
        count = len({name.split(".")[0] for name in saved.heads})
        return f"{saved.source} has {count} heads but does not record where they belong; give {count} --exits"
    if stage.index not in exits:
        return f"{saved.source} has no exit there"
    own, state = model.heads[position].state_dict(), _head_state(saved, exits.index(stage.index))
    for name in sorted(own.keys() | state.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (own, state)]
        if shapes[0] != shapes[1]:
            return (
                f"{name} of the head is {shapes[1] or 'missing'} in {saved.source}, but {shapes[0] or 'missing'} here"
            )
    return None


def _head_state(saved: SavedWeights, position: int) -> dict[str, Any]:
    prefix = f"{position}."
    return {name.removeprefix(prefix): value for name, value in saved.heads.items() if name.startswith(prefix)}


def find_config(place: str, location: str) -> Path | None:
    """Return config.json of a model named as in timm; None if there is none.

    timm has already read it, so a file from the Hub is in the cache.

    Args:
        place, location: as returned by `timm.models.parse_model_name`; a location on the Hub may end in "@" and a
            revision.
    """
    if place == "hf-hub":
        name, _, revision = location.partition("@")
        return Path(hf_hub_download(name, CONFIG, revision=revision or None))
    path = Path(location) / CONFIG
    return path if path.is_file() else None


def _exits(stages: list[Stage]) -> str:
    return f"the exit{'s' * (len(stages) > 1)} at {_names(stages)}"


def _names(stages: list[Stage]) -> str:
    return ", ".join(stage.name for stage in stages)


def create_backbone(
    name: str,
    img_size: int | None = None,
    initial_checkpoint: str | None = None,
    pretrained_path: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Call `timm.create_model`, passing `img_size` on if the model's image size is fixed at creation.

    Args:
        initial_checkpoint: checkpoint or saved model to load completely; see `load_checkpoint`.
        pretrained_path: likewise, but keeping a new classifier.
        kwargs: further arguments of `timm.create_model`.
    """
    if initial_checkpoint and pretrained_path:
        raise ValueError("initial_checkpoint and pretrained_path both load a checkpoint; give only one of them")
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
        return model  # `model_data_config` reports that the size is fixed
    model.pretrained_cfg["input_size"] = (channels, img_size, img_size)
    return model
