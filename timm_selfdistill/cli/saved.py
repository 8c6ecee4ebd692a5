"""Model names, the same in every command: a run directory, a saved model, or a repository on the Hub."""

from pathlib import Path

import timm
from timm.models import parse_model_name

PLACES = ("local-dir", "hf-hub")


def saved_model(name: str) -> str:
    """Return the folder or repository of a saved model without timm's prefix (local-dir: or hf-hub:). Of a run
    directory, this is best/."""
    for place in PLACES:
        name = name.removeprefix(f"{place}:")
    best = Path(name) / "best"
    return str(best) if best.is_dir() else name


def timm_name(name: str) -> str:
    """Return the name of a model for `timm.create_model`: local-dir:FOLDER (best/ of a run directory), hf-hub:ID, or an
    architecture, which takes precedence over a folder of the same name."""
    place = parse_model_name(name)[0] if ":" in name else None
    if place == "hf-hub" or (place is None and timm.is_model(name.split(".")[0])):
        return name
    folder = saved_model(name)
    if place == "local-dir" or Path(folder).is_dir():
        return f"local-dir:{folder}"
    return f"hf-hub:{name}" if place is None and name.count("/") == 1 else name
