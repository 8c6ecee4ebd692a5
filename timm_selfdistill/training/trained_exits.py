"""Exits that were trained before go on in a new run."""
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from timm.models import parse_model_name

from .. import hub
from ..hub.files import CONFIG
from ..hub.trust import read_json
from ..model import SelfDistillModel
from ..stages import Stage
from .saved_weights import SavedWeights, read_weights


def find_saved_weights(
        model: str, pretrained: bool, initial_checkpoint: str | None, pretrained_path: str | None,
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
    config = read_json(file) if file else None
    if not isinstance(config, dict) or not isinstance(config.get("self_distill"), dict):
        return None
    location = location if place == "local-dir" else location.partition("@")[0]
    revision = hub.pin(location, file.parent, None)
    settings = hub.read_config(hub.fetch_model(location, revision=revision, only_config=True))["self_distill"]
    if settings.get("truncated_to") is not None:
        raise ValueError(f"{name} is a truncated model, which has one exit only and cannot be trained on here; give the"
                         " whole model")
    heads = {}
    if settings["head"] is not None:  # else only the callable that made them could load them
        heads = SelfDistillModel.from_pretrained(location, revision=revision).heads.state_dict()
    return SavedWeights(location, {}, heads, settings["exits"], settings["head"], settings["head_args"], config)


def load_exits(
        model: SelfDistillModel, saved: SavedWeights, new_classifiers: bool = False, strict: bool = False) -> list[str]:
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
    kept, anew = [], {}
    for position, stage in enumerate(model.stages):
        if reason := _why_anew(model, stage, position, saved, exits, new_classifiers):
            if strict:
                raise ValueError(f"the exit at {stage.name} cannot be loaded: {reason}")
            anew.setdefault(reason, []).append(stage)
            continue
        model.heads[position].load_state_dict(_head_state(saved, exits.index(stage.index)))
        kept.append(stage)
    lines = [f"{_exits(kept, 'goes', 'go')} on with the heads of {saved.source}"] if kept else []
    if kept and guessed:
        lines.append(f"{saved.source} does not record which exits its {count} heads belong to: taken for those of"
                     f" {_names(kept)}; other --exits may be right")
    lines += [f"{_exits(group, 'begins', 'begin')} anew: {reason}" for reason, group in anew.items()]
    if left_out := [index for index in exits or [] if index not in stages]:
        names = ", ".join(model.backbone.feature_info[index]["module"] for index in left_out)
        lines.append(f"trained exits of {saved.source} left out: {names}")
    return lines


def _why_anew(
        model: SelfDistillModel, stage: Stage, position: int, saved: SavedWeights, exits: list[int] | None,
        new_classifiers: bool,
) -> str | None:
    """Why an exit cannot go on; None where it can."""
    if new_classifiers:
        return f"the classifiers are new, those of {saved.source} are for other classes"
    if saved.own_head:
        return f"the heads of {saved.source} were made by a callable, and code is never loaded"
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
