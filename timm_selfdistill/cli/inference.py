"""Commands evaluate, calibrate, tradeoff and export."""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import nn

from .. import hub
from ..inference import EarlyExit
from ..inference.calibration import BUDGETS
from ..inference.evaluation import predict_all, smallest_that_pays, speedups_by_batch, trace_curve
from ..inference.export import STAGES_FILE, export_onnx, export_stages
from ..inference.gallery import choose_images, plot_gallery
from ..inference.policy import POLICIES
from ..model import SelfDistillModel
from ..training.data.images import value_ranges
from ..training.data.loaders import MeasuredImages
from ..training.data.splits import ImageDataset
from ..training.outputs.metrics import (
    ExitMeter,
    exit_costs,
    exit_logits,
    find_speedups,
    merge_rows,
    model_name,
    with_speedups,
)
from ..training.outputs.run_directory import print_exits, write_json
from .data_flags import PREPROCESSING_FLAGS
from .export_timm import export_timm, without_accuracy
from .opening import add_measuring_flags, add_model_flags, load_any_model, load_model, open_data, read_data
from .program import parse_exit
from .record import read_record
from .saved import saved_model

BUDGET_NOT_MET = 1
"""Exit code of a calibration that could not meet its budget."""
PAYING_IMAGES = 64
Measured = MeasuredImages[ImageDataset]


def add_parsers(commands: Any) -> None:
    """Add the parsers of evaluate, calibrate, tradeoff and export."""
    evaluate = commands.add_parser("evaluate", help="measure accuracy, cost and speed of every exit")
    calibrate = commands.add_parser("calibrate", help="find thresholds for early exit, and save them with the model")
    tradeoff = commands.add_parser("tradeoff", help="plot accuracy over cost, and which images leave at which exit")
    export = commands.add_parser("export", help="write ONNX files, or convert a checkpoint to a saved model")
    for parser in (evaluate, calibrate, tradeoff, export):
        add_model_flags(parser)
    _add_export_flags(export)
    for parser in (evaluate, calibrate, tradeoff):
        add_measuring_flags(parser)
    for parser in (calibrate, tradeoff):
        parser.add_argument(
            "--policy", choices=POLICIES, help="criterion for leaving (default: the model's own, else confidence)"
        )
    for name, words in zip(
        BUDGETS,
        (
            "maximum drop of top-1 accuracy below the plain network, in points",
            "maximum average multiply-adds per image",
            "minimum speed-up over the plain network",
        ),
    ):
        calibrate.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="NUMBER", help=words)
    calibrate.add_argument(
        "--split-seed",
        type=int,
        default=0,
        metavar="SEED",
        help="random seed for splitting the images into three parts (default: %(default)s)",
    )
    calibrate.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the calibrated model (default: the model's own folder)"
    )
    tradeoff.add_argument("--baseline", metavar="DIR", help="saved plain network for comparison")
    tradeoff.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("."),
        help="folder for tradeoff.json, exits.png and gallery.png (default: the current folder)",
    )


def _add_export_flags(export: argparse.ArgumentParser) -> None:
    export.add_argument(
        "--format",
        choices=("onnx", "timm"),
        default="onnx",
        help="onnx, or timm for a saved model, which timm and this package load; with timm, MODEL may also be a"
        " checkpoint of a run or of timm's train.py (default: %(default)s)",
    )
    export.add_argument(
        "--model",
        dest="network",
        metavar="NAME",
        help="with --format timm, the timm model of a checkpoint that does not record it",
    )
    export.add_argument(
        "--exit",
        default="-1",
        help="exit to export: 0 is the first, -1 the deepest (plain network), ensemble the average"
        " (default: %(default)s)",
    )
    export.add_argument("--staged", action="store_true", help="export a file for each stage instead of one exit")
    export.add_argument(
        "--output", type=Path, required=True, metavar="PATH", help="file; with --staged or --format timm a folder"
    )


def evaluate(args: argparse.Namespace) -> int:
    record = read_record(args.model, args.revision)
    model = load_any_model(args.model, record.revision).to(args.device)
    loader = open_data(model, record, read_data(args, record), args)
    rows = _evaluate(model, loader)
    rows = with_speedups(model, rows, _input_size(loader))
    if isinstance(model, SelfDistillModel) and model.early_exit:
        _say_calibrated(model, loader)
        rows.append(_evaluate_early_exit(EarlyExit(model), loader))
    print_exits(Console(soft_wrap=True), f"{model_name(model)} on {len(loader.kept)} images", rows)
    if isinstance(model, SelfDistillModel) and model.early_exit:
        _say_when_it_pays(EarlyExit(model), loader)
    _say_unreadable(loader)
    return 0


def calibrate(args: argparse.Namespace) -> int:
    output = args.output or Path(args.model)
    if args.output is None and not output.is_dir():
        raise ValueError(f"{args.model} is not a local folder; give --output DIR for the calibrated model")
    record = read_record(args.model, args.revision)
    model = load_model(record).to(args.device)
    loader = open_data(model, record, read_data(args, record), args)
    budget = {name: getattr(args, name) for name in BUDGETS}
    report = EarlyExit(model, policy=args.policy).calibrate(loader, **budget, seed=args.split_seed)
    Console(soft_wrap=True).print(report)
    _say_unreadable(loader)
    if not report.met:
        print("nothing was saved: relax the budget, or give more images")
        return BUDGET_NOT_MET
    model.early_exit = {**(model.early_exit or {}), "dataset": _measured(loader)}
    metrics = hub.read_metrics(hub.fetch_model(args.model, revision=record.revision, only_config=True))
    if any(getattr(args, name) is not None for name in PREPROCESSING_FLAGS):
        metrics = without_accuracy(metrics)  # measured with other preprocessing
    model.save_pretrained(output, metrics=metrics, check=False, data_config=loader.data.data_config)
    print(f"saved in {output}; use it with EarlyExit(SelfDistillModel.from_pretrained({str(output)!r}))")
    return 0


def tradeoff(args: argparse.Namespace) -> int:
    records = [read_record(args.model, args.revision)]
    model = load_model(records[0]).to(args.device)
    if args.baseline:
        if not Path(args.baseline).is_dir():
            raise FileNotFoundError(f"--baseline {args.baseline} is not the folder of a saved model")
        records.append(read_record(saved_model(args.baseline)))
    images = read_data(args, *records)
    loader = open_data(model, records[0], images, args)
    early_exit = EarlyExit(model, policy=args.policy)
    rows, (curve, halving) = _evaluate(model, loader), trace_curve(early_exit, loader)
    baseline = None
    if args.baseline:
        plain = timm.create_model(f"local-dir:{saved_model(args.baseline)}", pretrained=True).eval().to(args.device)
        baseline = _evaluate(plain, open_data(plain, records[1], images, args))[0]
    calibrated = None
    if early_exit.thresholds:
        _say_calibrated(model, loader)
        calibrated = _evaluate_early_exit(early_exit, loader)
    early_exit.thresholds = early_exit.thresholds or halving
    output, labels = predict_all(early_exit, loader)
    args.output.mkdir(parents=True, exist_ok=True)
    name = model_name(model)
    count = len(loader.kept)
    hub.plot_exits(args.output / "exits.png", name, rows, curve, calibrated, baseline, images=count)
    chosen = choose_images(output, columns=8)
    config = loader.data.data_config or {}
    pictures = {
        position: _as_picture(config, loader.data[loader.kept[position]][0])
        for row in chosen.values()
        for position in row
    }
    names = model.backbone.pretrained_cfg.get("label_names") or [f"class {i}" for i in range(model.num_classes)]
    plot_gallery(args.output / "gallery.png", pictures, chosen, output, labels, names)
    write_json(
        args.output / "tradeoff.json",
        {
            "model": name,
            "images": count,
            "exits": rows,
            "early_exit": curve,
            "calibrated": calibrated,
            "baseline": baseline,
        },
    )
    print(f"wrote {', '.join(str(args.output / file) for file in ('tradeoff.json', 'exits.png', 'gallery.png'))}")
    _say_unreadable(loader)
    return 0


def export(args: argparse.Namespace) -> int:
    if args.format == "timm":
        return export_timm(args)
    if args.network:
        raise ValueError(
            f"--model {args.network} is for --format timm, but the format is onnx; add --format timm, or leave --model"
            " out"
        )
    record = read_record(args.model, args.revision)
    model = load_any_model(record.model, record.revision)
    if args.staged:
        if not isinstance(model, SelfDistillModel):
            raise ValueError(f"{record.model} has only one exit, so --staged does not apply; leave it out")
        paths = export_stages(model, args.output, value_ranges=value_ranges(record.value_range))
        print(f"wrote {', '.join(path.name for path in paths)} and {STAGES_FILE} to {args.output}")
    else:
        export_onnx(model, args.output, parse_exit(args.exit))
        print(f"wrote {args.output}")
    return 0


def _measured(loader: Measured) -> hub.ImageSource:
    """Return the source of the images, see `ImageSplits.source`, and their number."""
    return {**(loader.data.source or {}), "images": len(loader.kept)}


def _say_calibrated(model: SelfDistillModel, loader: Measured) -> None:
    if (model.early_exit or {}).get("dataset") == _measured(loader):
        print("the early-exit thresholds were calibrated on these images; accuracy on other images may be lower")


def _input_size(loader: Measured) -> tuple[int, int, int]:
    channels, height, width = next(iter(loader))[0].shape[1:]
    return channels, height, width


def _say_unreadable(loader: Measured) -> None:
    if loader.unreadable:
        images = "1 image" if loader.unreadable == 1 else f"{loader.unreadable} images"
        print(f"{images} could not be read and {'was' if loader.unreadable == 1 else 'were'} skipped")


def _evaluate(model: nn.Module, loader: Measured) -> list[hub.ExitRow]:
    """Return a row per exit with accuracy and cost."""
    device = next(model.parameters()).device
    meter = ExitMeter(len(model.exits) if isinstance(model, SelfDistillModel) else 1, device)
    with torch.no_grad():
        for x, y in loader:
            meter.update(exit_logits(model, x.to(device)), y.to(device))
    return merge_rows(meter.compute(meter.totals), exit_costs(model, _input_size(loader)))


def _evaluate_early_exit(early_exit: EarlyExit, loader: Measured) -> hub.ExitRow:
    """Return the row of early exit; its speed-up is measured on one batch of the images."""
    output, labels = predict_all(early_exit, loader)
    meter = ExitMeter(1, torch.device("cpu"))
    meter.update([output.logits], labels)
    (metrics,) = meter.compute(meter.totals)
    x = next(iter(loader))[0].to(next(early_exit.model.parameters()).device)
    costs = early_exit.find_costs("macs", x)
    used = [threshold is not None for threshold in early_exit.thresholds or ()]
    macs = float(costs.paths(used)[output.exit].mean())
    (speedup,) = find_speedups(early_exit.model, [early_exit.predict], x)
    row: hub.ExitRow = {
        "exit": "early",
        "top1": metrics.top1,
        "top5": metrics.top5,
        "loss": metrics.loss,
        "module": "",
        "macs": macs,
        "share": macs / costs.plain,
    }
    return row if speedup is None else row | {"speedup": speedup}


def _say_when_it_pays(early_exit: EarlyExit, loader: Measured) -> None:
    """Print the speed-up of early exit by batch size, up to that of the loader or 64. The images are spread over the
    data, which may be sorted by class."""
    kept = loader.kept
    count = min(len(kept), max(PAYING_IMAGES, loader.loader.batch_size or 0))
    spread = (kept[position * len(kept) // count] for position in range(count))
    x = torch.stack([loader.data[index][0] for index in spread]).to(next(early_exit.model.parameters()).device)
    speedups = speedups_by_batch(early_exit, x)
    smallest, largest = smallest_that_pays(speedups), max(speedups)
    pays = f"pays off in batches of {smallest} or more" if smallest else f"does not pay off in batches up to {largest}"
    print(f"early exit {pays}: {', '.join(f'{size}: {speedup:.2f}x' for size, speedup in speedups.items())}")


def _as_picture(config: dict[str, Any], image: torch.Tensor) -> torch.Tensor:
    """Undo the normalization of an image, to values from 0 to 1."""
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1)
