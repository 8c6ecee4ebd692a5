"""The files of a saved model: one folder, two readers.

`config.json` and `model.safetensors` are timm's own layout, read by `timm.create_model("local-dir:FOLDER",
pretrained=True)` without this package. Our key "self_distill" in config.json and `self_distill.safetensors`, the
heads, ride along; README.md is the model card, with exits.png.
"""
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from ..version import __version__
from .replace import finish_replacing
from .trust import check_config, check_links, check_names, check_tensors, preprocessing, read_json

FORMAT_VERSION = 1
CONFIG, BACKBONE, HEADS = "config.json", "model.safetensors", "self_distill.safetensors"
CARD, PICTURE = "README.md", "exits.png"


def read_config(folder: str | PathLike) -> dict[str, Any]:
    """config.json of a saved model.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: it is no JSON, not one of ours, of another format version, or asks for what `trust.py` refuses.
    """
    path = Path(folder) / CONFIG
    finish_replacing(Path(folder))
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a folder written by save_pretrained")
    check_names((entry.name for entry in Path(folder).iterdir()), folder)
    check_links(Path(folder), (CONFIG, BACKBONE, HEADS))
    config = read_json(path)
    settings = config.get("self_distill") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or "architecture" not in config:
        raise ValueError(
            f'{path} has no "self_distill" entry: this is not a self-distilled model; load a plain timm model with'
            f' timm.create_model("local-dir:{folder}", pretrained=True)'
        )
    version = settings.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, this timm-selfdistill {__version__} reads {FORMAT_VERSION};"
            " it was written by another version of timm-selfdistill"
            f" ({settings.get('timm_selfdistill_version', 'unknown')}): install that one"
        )
    expected = {"exits": list, "head": (str, type(None)), "head_args": dict}
    for key, kind in expected.items():
        if key not in settings or not isinstance(settings[key], kind):
            raise ValueError(f'{path} is damaged: "self_distill" has {key}={settings.get(key)!r}; save the model again')
    check_config(config, path)
    return config


class NoRandomInit(TorchFunctionMode):
    """Within it random first values are not drawn, which takes most of the time of making a network.

    For networks whose parameters are all loaded afterwards.
    """

    SKIPPED = frozenset({
        Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_, init.kaiming_normal_,
        init.kaiming_uniform_, init.xavier_normal_, init.xavier_uniform_})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_backbone(config: dict[str, Any], folder: str | PathLike) -> nn.Module:
    """The timm model that a config of `read_config` describes, with fresh weights.

    Raises:
        ValueError: timm makes no network of it.
    """
    path = Path(folder) / CONFIG
    try:
        return timm.create_model(
            config["architecture"], pretrained_cfg=preprocessing(config, path), **(config.get("model_args") or {}))
    except Exception as error:  # whatever timm's code does with arguments that it was not written for
        reason = shorten(repr(error), 200)
        raise ValueError(f"{path}: timm does not make a network of its model_args: {reason}") from error


def check_model_files(folder: str | PathLike, backbone: nn.Module, heads: nn.Module) -> None:
    """Raise unless the files hold just the tensors of these modules, which may be on the meta device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds tensors of other names, shapes or kinds.
    """
    for module, name in ((backbone, BACKBONE), (heads, HEADS)):
        check_tensors(Path(folder) / name, module)


def load_weights(backbone: nn.Module, heads: nn.Module, folder: str | PathLike) -> None:
    """Load backbone and heads from files that `check_model_files` found to fit."""
    for module, name in ((backbone, BACKBONE), (heads, HEADS)):
        module.load_state_dict(load_file(Path(folder) / name))


def read_metrics(folder: str | PathLike) -> dict[str, Any] | None:
    """What is recorded of a saved model, self-distilled or plain; None where nothing is, or there is no model."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    return facts(config).get("metrics")


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that timm does not read."""
    return config.get("self_distill", config)
