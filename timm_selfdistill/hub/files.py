"""The files of a saved model: one folder, two readers.

`config.json` and `model.safetensors` are timm's own layout, read by `timm.create_model("local-dir:FOLDER",
pretrained=True)` without this package. Our key "self_distill" in config.json and `self_distill.safetensors`, the
heads, ride along; README.md is the model card, with exits.png.
"""

from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from safetensors.torch import load_file
from torch import nn

from ..version import __version__
from .records import CalibrationRecord
from .replace import finish_replacing
from .trust import (
    MAX_JSON_BYTES,
    check_exits,
    check_links,
    check_memory,
    check_network,
    check_tensors,
    read_json,
    short,
)

FORMAT_VERSION = 2
VERSIONS = {"format_version": FORMAT_VERSION, "timm_selfdistill_version": __version__}
CONFIG, BACKBONE, HEADS = "config.json", "model.safetensors", "self_distill.safetensors"
CARD, PICTURE = "README.md", "exits.png"
FILES = (CONFIG, BACKBONE, HEADS, CARD, PICTURE)


class RequiredSettings(TypedDict):
    exits: list[int]
    """`feature_info` indices of the shallow exits."""
    head: str | None
    """None stands for a callable."""
    head_args: dict[str, Any]


class ExitSettings(RequiredSettings, total=False):
    """What makes the exits of a model again: "self_distill" of its config.json, without versions and metrics."""

    early_exit: CalibrationRecord
    """What `EarlyExit.calibrate` found."""
    truncated_to: int | str
    """Of a `TruncatedModel`: its exit."""


def read_network(folder: str | PathLike) -> dict[str, Any]:
    """config.json of a timm model, self-distilled or plain.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: it is no JSON, describes no timm model, or asks for what `trust.py` refuses.
    """
    path = Path(folder) / CONFIG
    finish_replacing(Path(folder))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a folder written by save_pretrained, best/ or"
            " last/ of a run, or what timm-selfdistill export --format timm makes of a checkpoint"
        )
    check_links(Path(folder), (CONFIG, BACKBONE, HEADS))
    config = read_json(path)
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f'{path} has no "architecture": it describes no timm model')
    check_network(config, path)
    return config


def read_config(folder: str | PathLike) -> dict[str, Any]:
    """config.json of a self-distilled model.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: as in `read_network`; or it is a plain model's, or of another format version.
    """
    path, config = Path(folder) / CONFIG, read_network(folder)
    settings = config.get("self_distill")
    if not isinstance(settings, dict):
        raise ValueError(
            f'{path} has no "self_distill" entry: this is not a self-distilled model; load a plain timm model with'
            f' timm.create_model("local-dir:{folder}", pretrained=True)'
        )
    check_version(settings, path)
    expected: dict[str, type | tuple[type, ...]] = {"exits": list, "head": (str, type(None)), "head_args": dict}
    for key, kind in expected.items():
        if key not in settings or not isinstance(settings[key], kind):
            raise ValueError(
                f'{path} is damaged: "self_distill" has {key}={short(settings.get(key))}; save the model again'
            )
    check_exits(settings, path)
    return config


def check_version(settings: dict[str, Any], where: str | PathLike) -> None:
    """Raise ValueError for "self_distill" of a config that another version of this package wrote in another form."""
    version = settings.get("format_version")
    if version == 1 and settings.get("head") in ("linear", None):  # heads that are as they were
        return
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {short(version)}, this timm-selfdistill {__version__} reads {FORMAT_VERSION};"
            " it was written by another version of timm-selfdistill"
            f" ({short(settings.get('timm_selfdistill_version', 'unknown'))}): install that one, or take the"
            " backbone alone with timm, which reads every version"
        )


def check_model_files(folder: str | PathLike, backbone: nn.Module, heads: nn.Module) -> None:
    """Raise unless the files hold just the tensors of these modules, which may be on the meta device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds tensors of other names, shapes or kinds; or a module takes far more
            memory than its file.
    """
    for module, name in ((backbone, BACKBONE), (heads, HEADS)):
        check_tensors(Path(folder) / name, module)
        check_memory(Path(folder) / name, module)


def check_sizes(sizes: dict[str, int], backbone: nn.Module, heads: nn.Module) -> None:
    """Refuse files that are larger than these modules, which may be on the meta device, could fill.

    Args:
        sizes: bytes of each file.

    Raises:
        ValueError: one is.
    """
    for module, name in ((backbone, BACKBONE), (heads, HEADS)):
        tensors = module.state_dict().values()
        most = MAX_JSON_BYTES + sum(8 * tensor.numel() for tensor in tensors)
        if sizes.get(name, 0) > most:
            raise ValueError(f"{name} has {sizes[name]} bytes; this network's tensors fill {most} at most")


def load_weights(backbone: nn.Module, heads: nn.Module, folder: str | PathLike) -> None:
    """Load backbone and heads from files that `check_model_files` found to fit."""
    for module, name in ((backbone, BACKBONE), (heads, HEADS)):
        module.load_state_dict(load_file(Path(folder) / name))


def read_metrics(folder: str | PathLike) -> dict[str, Any] | None:
    """What is recorded of a saved model, self-distilled or plain; None where nothing is, or there is no model."""
    path = Path(folder) / CONFIG
    finish_replacing(Path(folder))
    if not path.is_file():
        return None
    config = read_json(path)
    return facts(config).get("metrics")


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that timm does not read."""
    settings = config.get("self_distill")
    return settings if isinstance(settings, dict) else config
