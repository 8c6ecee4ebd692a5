"""The files of a Space: the page of a model, with the model in it."""

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import jinja2

from ..hub import MARK, MODEL_FILES, read_config, stage_model
from ..version import __version__
from .recorded import GALLERY, TRADEOFF, find_tradeoff

APP, REQUIREMENTS, README, MODEL = "app.py", "requirements.txt", "README.md", "model"
SPACE_FILES = (APP, REQUIREMENTS, README, *(f"{MODEL}/{name}" for name in (*MODEL_FILES, TRADEOFF, GALLERY)))
"""What a Space of ours may have; a push leaves all other files alone."""


def stage_space(folder: Path, target: Path, tradeoff: Path | None = None) -> None:
    """Write the files of a Space into a folder: app.py, requirements.txt, README.md, and the model in model/.

    Args:
        folder: of a saved model with all its exits.
        tradeoff: a folder that `timm-selfdistill tradeoff` wrote; its curve and its gallery, which shows images that
            the model was measured on, are uploaded, too. None leaves them out.

    Raises:
        FileNotFoundError: `folder` is no complete saved model, or `tradeoff` has no tradeoff.json.
        ValueError: it is a plain or a truncated model, or one with heads of its own, which no page can load.
    """
    config = read_config(folder)
    settings = config["self_distill"]
    if "truncated_to" in settings:
        raise ValueError(f"{folder} is a truncated model with one exit; a Space shows several: give the whole model")
    if settings["head"] is None:
        raise ValueError(f"{folder} has heads of its own, whose code is not saved with it, so a Space cannot load it")
    stage_model(folder, target / MODEL)
    if tradeoff is not None and (place := find_tradeoff(folder, tradeoff)):
        for name in (TRADEOFF, GALLERY):
            if (place / name).is_file():
                shutil.copy(place / name, target / MODEL / name)
    templates = Path(__file__).parent / "templates"
    shutil.copy(templates / "space_app.py.txt", target / APP)
    (target / REQUIREMENTS).write_text(f"timm-selfdistill[demo]=={__version__}\n", encoding="utf-8")
    (target / README).write_text(_readme(config, (templates / "space_readme.md").read_text("utf-8")), encoding="utf-8")


def _readme(config: dict[str, Any], template: str) -> str:
    return jinja2.Template(template, keep_trailing_newline=True, trim_blocks=True).render(
        architecture=config["architecture"],
        exits=len(config["self_distill"]["exits"]) + 1,
        classes=config["num_classes"],
        gradio=importlib.metadata.version("gradio") if importlib.util.find_spec("gradio") else None,
        mark=MARK,
    )
