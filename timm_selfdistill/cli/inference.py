"""evaluate, calibrate, tradeoff and export of the command `timm-selfdistill`."""

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
"""Exit code of a calibration that could not keep what was asked for."""
PAYING_IMAGES = 64
Measured = MeasuredImages[ImageDataset]


def add_parsers(commands: Any) -> None:
    """evaluate, calibrate, tradeoff and export."""
    evaluate = commands.add_parser("evaluate", help="accuracy, cost and speed of every exit")
    calibrate = commands.add_parser("calibrate", help="find thresholds for early exit, and save them with the model")
    tradeoff = commands.add_parser("tradeoff", help="draw accuracy over cost, and which images leave where")
    export = commands.add_parser("export", help="write ONNX files, or make a saved model of a checkpoint")
    for parser in (evaluate, calibrate, tradeoff, export):
        add_model_flags(parser)
    export.add_argument(
        "--format",
        choices=("onnx", "timm"),
        default="onnx",
        help="timm: a saved model, which timm and this package load; MODEL may then be a checkpoint of"
        " a run, or one of timm's training script, too",
    )
    export.add_argument(
        "--model",
        dest="network",
        metavar="NAME",
        help="with --format timm, the timm model of a checkpoint that does not tell it",
    )
    export.add_argument("--exit", default="-1", help="0 is the shallowest, -1 the plain network; ensemble is the mean")
    export.add_argument("--staged", action="store_true", help="instead of one exit, a file for each stage")
    export.add_argument("--output", type=Path, required=True, metavar="PATH", help="file, or with --staged folder")
    for parser in (evaluate, calibrate, tradeoff):
        add_measuring_flags(parser)
    for parser in (calibrate, tradeoff):
        parser.add_argument(
            "--policy", choices=POLICIES, help="what makes an image leave (default: the model's own, else confidence)"
        )
    for name, words in zip(
        BUDGETS, ("points of top-1 below the plain network", "mean multiply-adds of an image", "over the plain network")
    ):
        calibrate.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="NUMBER", help=words)
    calibrate.add_argument(
        "--split-seed", type=int, default=0, metavar="SEED", help="of the split of the images into three parts"
    )
    calibrate.add_argument("--output", type=Path, metavar="DIR", help="where to save it (default: where it is)")
    tradeoff.add_argument("--baseline", metavar="DIR", help="saved plain network, to compare with")
    tradeoff.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("."),
        help="gets tradeoff.json, exits.png and gallery.png (default: this folder)",
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
        raise ValueError(f"{args.model} is no folder here: say with --output where to save the calibrated model")
    record = read_record(args.model, args.revision)
    model = load_model(record).to(args.device)
    loader = open_data(model, record, read_data(args, record), args)
    budget = {name: getattr(args, name) for name in BUDGETS}
    report = EarlyExit(model, policy=args.policy).calibrate(loader, **budget, seed=args.split_seed)
    Console(soft_wrap=True).print(report)
    _say_unreadable(loader)
    if not report.met:
        print("nothing is saved: ask for less, or give more images")
        return BUDGET_NOT_MET
    model.early_exit = {**(model.early_exit or {}), "dataset": _measured(loader)}
    metrics = hub.read_metrics(hub.fetch_model(args.model, revision=record.revision, only_config=True))
    if any(getattr(args, name) is not None for name in PREPROCESSING_FLAGS):
        metrics = without_accuracy(metrics)  # which is that of other preprocessing
    model.save_pretrained(output, metrics=metrics, check=False, data_config=loader.data.data_config)
    print(f"saved in {output}; use it with EarlyExit(SelfDistillModel.from_pretrained({str(output)!r}))")
    return 0


def tradeoff(args: argparse.Namespace) -> int:
    records = [read_record(args.model, args.revision)]
    model = load_model(records[0]).to(args.device)
    if args.baseline:
        if not Path(args.baseline).is_dir():
            raise FileNotFoundError(f"--baseline {args.baseline} is no folder of a saved model")
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
    hub.plot_exits(args.output / "exits.png", name, rows, curve, calibrated, baseline)
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
            "images": len(loader.kept),
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
            f"--model {args.network} names the network of a checkpoint for --format timm, and the format"
            " is onnx; leave one out"
        )
    record = read_record(args.model, args.revision)
    model = load_any_model(record.model, record.revision)
    if args.staged:
        if not isinstance(model, SelfDistillModel):
            raise ValueError(f"{record.model} has one exit only, and --staged writes a file for each; leave it out")
        paths = export_stages(model, args.output, value_ranges=value_ranges(record.value_range))
        print(f"wrote {', '.join(path.name for path in paths)} and {STAGES_FILE} to {args.output}")
    else:
        export_onnx(model, args.output, parse_exit(args.exit))
        print(f"wrote {args.output}")
    return 0


def _measured(loader: Measured) -> hub.ImageSource:
    """Where images come from, see `ImageSplits.source`, and how many there are."""
    return {**(loader.data.source or {}), "images": len(loader.kept)}


def _say_calibrated(model: SelfDistillModel, loader: Measured) -> None:
    if (model.early_exit or {}).get("dataset") == _measured(loader):
        print("the thresholds for early exit were chosen on these images, so its accuracy on others may be lower")


def _input_size(loader: Measured) -> tuple[int, int, int]:
    channels, height, width = next(iter(loader))[0].shape[1:]
    return channels, height, width


def _say_unreadable(loader: Measured) -> None:
    if loader.unreadable:
        images = "1 image" if loader.unreadable == 1 else f"{loader.unreadable} images"
        print(f"{images} could not be read: left out")


def _evaluate(model: nn.Module, loader: Measured) -> list[hub.ExitRow]:
    """A row per exit: accuracy and cost."""
    device = next(model.parameters()).device
    meter = ExitMeter(len(model.exits) if isinstance(model, SelfDistillModel) else 1, device)
    with torch.no_grad():
        for x, y in loader:
            meter.update(exit_logits(model, x.to(device)), y.to(device))
    return merge_rows(meter.compute(meter.totals), exit_costs(model, _input_size(loader)))


def _evaluate_early_exit(early_exit: EarlyExit, loader: Measured) -> hub.ExitRow:
    """The row of early exit; its speed is that of one batch of the images."""
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
    """How the speed of early exit depends on the number of images in a batch, up to that of the loader or 64. The
    images are spread over the data, which may be sorted by class."""
    kept = loader.kept
    count = min(len(kept), max(PAYING_IMAGES, loader.loader.batch_size or 0))
    spread = (kept[position * len(kept) // count] for position in range(count))
    x = torch.stack([loader.data[index][0] for index in spread]).to(next(early_exit.model.parameters()).device)
    speedups = speedups_by_batch(early_exit, x)
    smallest, largest = smallest_that_pays(speedups), max(speedups)
    pays = f"pays in batches of {smallest} and more" if smallest else f"does not pay in batches of {largest}"
    print(f"early exit {pays}: {', '.join(f'{size}: {speedup:.2f}x' for size, speedup in speedups.items())}")


def _as_picture(config: dict[str, Any], image: torch.Tensor) -> torch.Tensor:
    """From 0 to 1, as it was before it was normalised."""
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1)
