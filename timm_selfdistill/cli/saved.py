"""The names of models, the same in every command: a run directory, a saved folder, a repository on the Hub."""

from pathlib import Path

import timm
from timm.models import parse_model_name

PLACES = ("local-dir", "hf-hub")


def saved_model(name: str) -> str:
    """The folder or the id of a saved model, without timm's prefix local-dir: or hf-hub:; of a run directory best/."""
    for place in PLACES:
        name = name.removeprefix(f"{place}:")
    best = Path(name) / "best"
    return str(best) if best.is_dir() else name


def timm_name(name: str) -> str:
    """A model as timm's `create_model` names it: local-dir:FOLDER, of a run directory best/, or hf-hub:ID, or the
    architecture, which comes first where a folder has the same name."""
    place = parse_model_name(name)[0] if ":" in name else None
    if place == "hf-hub" or (place is None and timm.is_model(name.split(".")[0])):
        return name
    folder = saved_model(name)
    if place == "local-dir" or Path(folder).is_dir():
        return f"local-dir:{folder}"
    return f"hf-hub:{name}" if place is None and name.count("/") == 1 else name
