"""export --format timm: convert any checkpoint to a saved model."""

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
"""Entries in a row of metrics that do not depend on the weights."""


def export_timm(args: argparse.Namespace) -> int:
    """Write a saved model, which `timm.create_model("local-dir:FOLDER", pretrained=True)` also loads.

    The accuracies of a run belong to best/ and last/, and are not recorded with other weights of the run.

    Raises:
        ValueError: a flag is for ONNX only, or the network of the checkpoint is unknown or a different one.
    """
    if args.staged or args.exit != "-1":
        flag = "--staged" if args.staged else f"--exit {args.exit}"
        raise ValueError(
            f"{flag} is for --format onnx; a model exported with --format timm has all exits; leave it out"
        )
    source = Path(args.model)
    if source.exists() and not (source / CONFIG).is_file():
        model, metrics = _open_checkpoint(source, args.network)
    elif args.network:
        raise ValueError(f"{args.model} is a saved model, which records its network; leave --model {args.network} out")
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
    """Load the model of a checkpoint, and return it with its recorded metrics, without accuracies."""
    saved = read_weights(source)
    known = saved.config.get("architecture")
    if name and known and name.split(".")[0] != known:
        raise ValueError(f"{source} is a checkpoint of {known}, not {name}; leave --model out")
    if known:
        model = _make_recorded(saved)
    else:
        model = _make_named(saved, name or (read_record(source).get("arch") if source.is_file() else None))
    backbone = model.backbone if isinstance(model, SelfDistillModel) else model
    check_fits(backbone, saved.backbone, source)
    backbone.load_state_dict(saved.backbone)
    if isinstance(model, SelfDistillModel):
        say(*load_exits(model, saved, strict=True))
        model.early_exit = None  # its thresholds belong to other weights
    if saved.averaged:
        say(f"using the moving average in {source}")
    return model.eval(), without_accuracy(hub.facts(saved.config).get("metrics"))


def _make_recorded(saved: SavedWeights) -> nn.Module:
    """Create the network described by the saved model of a run or the record in a checkpoint."""
    if not saved.heads:
        with sketching():
            check_fits(build_backbone(saved.config, saved.source), saved.backbone, saved.source)
        return build_backbone(saved.config, saved.source)
    if saved.own_head:
        raise ValueError(
            f"the heads of {saved.source} were created by a callable, and code is never loaded; wrap the"
            " network with this callable in Python, load the weights and call save_pretrained"
        )
    SelfDistillModel.sketch(saved.config, saved.source)  # raises for what exceeds the limits
    return SelfDistillModel.from_config(saved.config, saved.source)


def _make_named(saved: SavedWeights, name: Any) -> nn.Module:
    """Create a network by name, with as many classes and channels as the weights."""
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(
            f"{saved.source} does not record its network; give the timm model with --model"
            + (f", got {name!r}" if name else "")
        )
    cfg = timm.get_pretrained_cfg(name)
    known = cfg.to_dict() if cfg else {}
    model = timm.create_model(  # which ignores None
        name,
        num_classes=_size_of(saved, known.get("classifier"), 0),
        in_chans=_size_of(saved, known.get("first_conv"), 1),
    )
    say(f"{saved.source} does not record its preprocessing; using that of {name}")
    if not saved.heads:
        return model
    wrapped = wrap_self_distill(model, head=saved.head or "bottleneck")
    count = len({tensor.split(".")[0] for tensor in saved.heads})
    if count != len(wrapped.stages):
        raise ValueError(
            f"{saved.source} has {count} heads but does not record where they belong, and {name} has"
            f" {len(wrapped.stages)} by default; export the original checkpoints, which record their exits, or wrap the"
            " network in Python, load the weights and call save_pretrained"
        )
    return wrapped


def _size_of(saved: SavedWeights, layer: str | Sequence[str] | None, dimension: int) -> int | None:
    """Return a dimension of the weight of a layer, or of the first of several; None if it does not exist."""
    weight = saved.backbone.get(f"{layer if isinstance(layer, str) else (layer or [''])[0]}.weight")
    return weight.shape[dimension] if weight is not None and weight.ndim > dimension else None


def without_accuracy(metrics: Any) -> dict[str, Any] | None:
    """Return a record of metrics without what was measured with the weights; None if it is not a record."""
    if not isinstance(metrics, dict):
        return None
    kept = {key: value for key, value in metrics.items() if key != "epoch"}
    if isinstance(kept.get("dataset"), dict):
        kept["dataset"] = {key: value for key, value in kept["dataset"].items() if key != "images"}
    rows = [{key: value for key, value in row.items() if key in COSTS} for row in hub.measured_rows(metrics)]
    return kept | {"exits": rows}
