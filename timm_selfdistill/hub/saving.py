"""Writing a saved model."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from timm.layers import SplitBatchNorm2d
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..cost import default_input_size, evaluating
from ..timm_model import as_timm
from .card import create_card, may_replace, measured_rows
from .files import BACKBONE, CARD, CONFIG, HEADS, PICTURE, VERSIONS, ExitSettings, facts, read_config
from .picture import plot_exits
from .records import ExitRow
from .replace import replacing_files
from .trust import read_json, short

Rebuild = Callable[[Path], tuple[nn.Module, nn.Module]]
SOURCE_KEYS = {
    "tag",
    "description",
    "origin_url",
    "paper_name",
    "paper_ids",
    "notes",
    "label_names",
    "label_descriptions",
    "test_input_size",
    "test_crop_pct",
    "test_pool_size",
}
"""Of a timm model's pretrained_cfg, what describes the weights that the model was created with, and how those are best
measured."""


def save_timm_model(
    backbone: nn.Module,
    folder: str | PathLike,
    *,
    full_backbone: nn.Module | None = None,
    model_args: dict[str, Any] | None = None,
    heads: nn.Module | None = None,
    settings: ExitSettings | None = None,
    metrics: Mapping[str, Any] | None = None,
    rows: list[ExitRow] | None = None,
    check: bool = True,
    picture: bool = True,
    rebuild: Rebuild | None = None,
    card_data: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
) -> None:
    """Write a timm model in timm's layout with its card, after seeing that it can be loaded from the files.

    Args:
        full_backbone: what config.json describes, where `backbone` is only a part of it; may be on the meta device.
        heads, settings: of a self-distilled model: its shallow classifiers, and what makes them again ("exits", "head",
            "head_args").
        metrics: what to record in config.json.
        rows, card_data: see `create_card`.
        check: False saves without rebuilding, where the same model was seen to be rebuilt before.
        picture: False leaves exits.png for a later `save_metrics` to draw.
        rebuild: gives, for the folder, the two models that must say the same, as it is and as it is loaded; None is the
            backbone, and what timm makes.
        data_config: the preprocessing that the model was measured with, as of `timm.data.resolve_data_config`; what it
            leaves out is as in the model's `pretrained_cfg`.

    Raises:
        ValueError: the model is not rebuilt, or it is beyond the limits of `trust.py`.
        FileExistsError: `folder` is a file.
    """
    earlier = _is_saved_here(Path(folder))
    with replacing_files(Path(folder)) as fresh:
        check_metrics(metrics)
        full_backbone = full_backbone or backbone
        data_config = {"input_size": default_input_size(full_backbone, model_args), **(data_config or {})}
        _save_config(full_backbone, fresh / CONFIG, model_args, settings, metrics, data_config)
        _save_tensors(backbone, fresh / BACKBONE)
        if heads is not None:
            read_config(fresh)  # a model that could not be loaded again is refused while the old files are in place
            _save_tensors(heads, fresh / HEADS)
        if check:
            check_rebuilds(rebuild or partial(_rebuild_with_timm, backbone), fresh, data_config["input_size"])
        if picture:
            _save_picture(fresh, rows or [], metrics)
        drawn = (fresh / PICTURE).exists()
        _save_card(fresh, Path(folder), rows or [], metrics, card_data, drawn)
        for path in fresh.iterdir():
            shutil.copymode(fresh / CONFIG, path)  # safetensors' files are for their owner alone
    for name, written in ((PICTURE, drawn), (HEADS, heads is not None)):
        if earlier and not written:
            (Path(folder) / name).unlink(missing_ok=True)  # it is of the model that was here before


def _is_saved_here(folder: Path) -> bool:
    """Whether a folder holds a model that this package saved, and not only files of the user's."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    try:
        config = read_json(path)
    except ValueError:  # no JSON, or not as this package writes it
        return False
    return isinstance(config, dict) and ("self_distill" in config or "metrics" in config)


def check_metrics(metrics: Any) -> None:
    """Raise ValueError for what JSON cannot hold."""
    try:
        json.dumps(metrics, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metrics must be what JSON can hold, got {short(metrics)}: {error}") from error


def save_metrics(folder: str | PathLike, metrics: Mapping[str, Any], picture: Path | None = None) -> None:
    """Record what else was measured of a saved model, in config.json and card, and draw exits.png where it is missing.

    Args:
        metrics: with "exits", the rows of the card. A picture that is there stays: accuracy and cost must be its own.
        picture: of these rows, where it has been drawn before.
    """
    check_metrics(metrics)
    with replacing_files(Path(folder)) as fresh:
        config = read_json(Path(folder) / CONFIG)
        facts(config)["metrics"] = metrics
        (fresh / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        if picture:
            shutil.copyfile(picture, fresh / PICTURE)
        elif not (Path(folder) / PICTURE).exists():
            _save_picture(fresh, measured_rows(metrics), metrics)
        drawn = any((place / PICTURE).exists() for place in (fresh, Path(folder)))
        _save_card(fresh, Path(folder), measured_rows(metrics), metrics, None, drawn)


def create_model_card(
    backbone: nn.Module,
    model_args: dict[str, Any],
    settings: ExitSettings,
    metrics: Mapping[str, Any] | None,
    rows: list[ExitRow],
    card_data: dict[str, Any],
    input_size: tuple[int, int, int],
) -> ModelCard:
    """The card that a model would be saved with."""
    with TemporaryDirectory() as folder:
        _save_config(backbone, Path(folder) / CONFIG, model_args, settings, metrics, {"input_size": input_size})
        return create_card(read_json(Path(folder) / CONFIG), rows, metrics, **card_data)


def _save_picture(fresh: Path, rows: list[ExitRow], metrics: Mapping[str, Any] | None) -> None:
    """Draw exits.png where accuracy and cost of every row are known."""
    if rows and all({"top1", "macs", "share"} <= row.keys() for row in rows):
        architecture = read_json(fresh / CONFIG)["architecture"]
        measured = (metrics or {}).get("dataset") or {}
        plot_exits(
            fresh / PICTURE,
            architecture,
            rows,
            agreement="reference" in (metrics or {}),
            images=measured.get("images"),
        )


def _save_card(
    fresh: Path,
    folder: Path,
    rows: list[ExitRow],
    metrics: Mapping[str, Any] | None,
    card_data: dict[str, Any] | None,
    picture: bool,
) -> None:
    if may_replace(folder / CARD):
        card = create_card(read_json(fresh / CONFIG), rows, metrics, picture=picture, **(card_data or {}))
        card.save(fresh / CARD)


def check_rebuilds(rebuild: Rebuild, folder: Path, input_size: tuple[int, int, int]) -> None:
    """Raise unless what is loaded from the files in `folder` gives the same logits."""
    advice = (
        "timm does not rebuild this backbone from what is known of it: {reason}. Pass what create_model was given:"
        ' wrap_self_distill(model, model_args={{"in_chans": 1, ...}})'
    )
    with torch.random.fork_rng(devices=[]):
        try:
            model, rebuilt = rebuild(folder)
        except (RuntimeError, TypeError, KeyError) as error:
            raise ValueError(advice.format(reason=shorten(str(error), 300))) from error
    like = next(p for p in model.parameters() if p.is_floating_point())
    rebuilt = rebuilt.to(device=like.device, dtype=like.dtype).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *input_size, generator=generator).to(like)
    with evaluating(model), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        try:
            expected, got = model(x), rebuilt(x)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(advice.format(reason=shorten(str(error), 300))) from error
    largest = float(expected.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(expected, got, rtol=1e-2, atol=1e-3 * largest, equal_nan=True):
        raise ValueError(advice.format(reason=f"its logits differ by {float((expected - got).abs().max()):.2g}"))


def _rebuild_with_timm(backbone: nn.Module, folder: Path) -> tuple[nn.Module, nn.Module]:
    return backbone, timm.create_model(f"local-dir:{folder}", pretrained=True)


def save_weights(module: nn.Module, folder: str | PathLike) -> None:
    """Write the weights of a model that is not timm's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(module, folder / f".{BACKBONE}.new")
    os.replace(folder / f".{BACKBONE}.new", folder / BACKBONE)


def unshared_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a module, contiguous, those that it holds under several names (as CoaT does) copied for each.

    safetensors refuses to write a tensor under two names, and timm reads only files with every name. The batch norms
    of augmentation splits but for the first, which training alone needs (arXiv:1911.09665, section 4.2), are left out.
    """
    tensors, storages = {}, set()
    auxiliary = tuple(f"{name}.aux_bn." for name, part in module.named_modules() if isinstance(part, SplitBatchNorm2d))
    for key, value in module.state_dict().items():
        if key.startswith(auxiliary):
            continue
        value = value.contiguous()
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        tensors[key] = value
    return tensors


def _save_tensors(module: nn.Module, path: Path) -> None:
    save_file(unshared_state_dict(module), path, metadata={"format": "pt"})


def _save_config(
    backbone: nn.Module,
    path: Path,
    model_args: dict[str, Any] | None,
    settings: ExitSettings | None,
    metrics: Mapping[str, Any] | None,
    data_config: dict[str, Any],
) -> None:
    """Write config.json as timm does, without what describes other weights than these."""
    names = as_timm(backbone).pretrained_cfg.get("label_names")
    model_config: dict[str, Any] = {}
    if names and len(names) == as_timm(backbone).num_classes:  # not those of pretrained weights for other classes
        model_config["label_names"] = names
    if settings is not None:
        model_config["self_distill"] = {**VERSIONS, **settings}
    if metrics is not None:
        facts(model_config)["metrics"] = metrics
    save_config_for_hf(
        backbone, str(path), model_config=model_config, model_args=model_args or {}, data_config=data_config
    )
    config = read_json(path)
    # transformers and timm's factory take the number of classes from its own place, and refuse it in two
    config.get("model_args", {}).pop("num_classes", None)
    left_behind = SOURCE_KEYS | ({"license"} if metrics and "license" in metrics else set())
    config["pretrained_cfg"] = {key: value for key, value in config["pretrained_cfg"].items() if key not in left_behind}
    license = (metrics or {}).get("license", "unknown")
    if license != "unknown":
        config["pretrained_cfg"]["license"] = license
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
