"""export --format timm: a saved model of any checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .. import hub
from ..hub.building import build_backbone, sketching
from ..hub.files import CONFIG
from ..model import SelfDistillModel, wrap_self_distill
from ..training.loop.initial_weights import SavedWeights, check_fits, load_exits, read_record, read_weights
from .opening import load_any_model
from .program import say

COSTS = ("exit", "module", "params", "macs", "share", "speedup")
"""What a row of metrics holds that does not depend on the weights."""


def export_timm(args: argparse.Namespace) -> int:
    """Write a saved model, which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, too.

    The accuracies of a run are those of best/ and last/, and are not recorded of its other weights.

    Raises:
        ValueError: a flag belongs to ONNX, or the network of the checkpoint is not known, or another one.
    """
    if args.staged or args.exit != "-1":
        flag = "--staged" if args.staged else f"--exit {args.exit}"
        raise ValueError(f"{flag} is for --format onnx, and a model for --format timm has all exits; leave one out")
    source = Path(args.model)
    if source.exists() and not (source / CONFIG).is_file():
        model, metrics = _open_checkpoint(source, args.network)
    elif args.network:
        raise ValueError(f"{args.model} is a saved model, which tells its network; leave --model {args.network} out")
    else:
        folder = hub.fetch_model(args.model, revision=args.revision, only_config=True)
        model = load_any_model(args.model, hub.pin(args.model, folder, args.revision))
        metrics = hub.read_metrics(folder)
    if isinstance(model, SelfDistillModel):
        model.save_pretrained(args.output, metrics=metrics)
    else:
        hub.save_timm_model(model, args.output, metrics=metrics, rows=hub.measured_rows(metrics))
    say(f"wrote {args.output}; timm.create_model('local-dir:{args.output}', pretrained=True) loads it")
    return 0


def _open_checkpoint(source: Path, name: str | None) -> tuple[nn.Module, dict[str, Any] | None]:
    """The model of a checkpoint, and what is known of it but for accuracies."""
    saved = read_weights(source)
    known = saved.config.get("architecture")
    if name and known and name.split(".")[0] != known:
        raise ValueError(f"{source} is of the network {known}, and --model names {name}; leave --model out")
    if known:
        model = _make_recorded(saved)
    else:
        model = _make_named(saved, name or (read_record(source).get("arch") if source.is_file() else None))
    backbone = model.backbone if isinstance(model, SelfDistillModel) else model
    check_fits(backbone, saved.backbone, source)
    backbone.load_state_dict(saved.backbone)
    if isinstance(model, SelfDistillModel):
        say(*load_exits(model, saved, strict=True))
        model.early_exit = None  # thresholds are those of other weights
    if saved.averaged:
        say(f"the moving average of {source} is taken")
    return model.eval(), without_accuracy(hub.facts(saved.config).get("metrics"))


def _make_recorded(saved: SavedWeights) -> nn.Module:
    """The network that the saved model or the record of a checkpoint describes."""
    if not saved.heads:
        with sketching():
            check_fits(build_backbone(saved.config, saved.source), saved.backbone, saved.source)
        return build_backbone(saved.config, saved.source)
    if saved.own_head:
        raise ValueError(
            f"the heads of {saved.source} were made by a callable, and code is never loaded; wrap the"
            " network with it in Python, load the weights and call save_pretrained"
        )
    SelfDistillModel.sketch(saved.config, saved.source)  # refuses what is beyond the limits
    return SelfDistillModel.from_config(saved.config, saved.source)


def _make_named(saved: SavedWeights, name: Any) -> nn.Module:
    """A network by its name, with as many classes and channels as the weights have."""
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(
            f"{saved.source} does not tell its network; name the timm model with --model"
            + (f", got {name!r}" if name else "")
        )
    cfg = timm.get_pretrained_cfg(name)
    known = cfg.to_dict() if cfg else {}
    model = timm.create_model(  # which passes over what is None
        name,
        num_classes=_size_of(saved, known.get("classifier"), 0),
        in_chans=_size_of(saved, known.get("first_conv"), 1),
    )
    say(f"{saved.source} does not record its preprocessing: that of {name} is taken")
    if not saved.heads:
        return model
    wrapped = wrap_self_distill(model, head=saved.head or "bottleneck")
    count = len({tensor.split(".")[0] for tensor in saved.heads})
    if count != len(wrapped.stages):
        raise ValueError(
            f"{saved.source} has {count} heads without a record of their exits, {name} has"
            f" {len(wrapped.stages)} by default; export the checkpoints that it was made of, which record"
            " them, or wrap the network in Python, load the weights and call save_pretrained"
        )
    return wrapped


def _size_of(saved: SavedWeights, layer: str | Sequence[str] | None, dimension: int) -> int | None:
    """A dimension of the weight of a layer, or of the first of several; None where there is none."""
    weight = saved.backbone.get(f"{layer if isinstance(layer, str) else (layer or [''])[0]}.weight")
    return weight.shape[dimension] if weight is not None and weight.ndim > dimension else None


def without_accuracy(metrics: Any) -> dict[str, Any] | None:
    """A record of metrics without what was measured of these weights; None where it is no record."""
    if not isinstance(metrics, dict):
        return None
    kept = {key: value for key, value in metrics.items() if key != "epoch"}
    if isinstance(kept.get("dataset"), dict):
        kept["dataset"] = {key: value for key, value in kept["dataset"].items() if key != "images"}
    rows = [{key: value for key, value in row.items() if key in COSTS} for row in hub.measured_rows(metrics)]
    return kept | {"exits": rows}
