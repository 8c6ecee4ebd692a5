"""Commands flat-minima, gradients, separability and agreement."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from rich.console import Console
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from .. import hub
from ..analysis import (
    AgreementReport,
    FlatMinimaReport,
    GradientReport,
    SeparabilityReport,
    measure_agreement,
    measure_flatness,
    measure_gradients,
    measure_separability,
    plot_agreement,
    plot_flatness,
    plot_gradient_history,
    plot_gradients,
    plot_separability,
)
from ..hub.files import CONFIG
from ..hub.trust import short
from ..model import SelfDistillModel
from ..task import SelfDistillTask
from ..timm_model import as_timm
from ..training.data.loaders import MeasuredImages
from ..training.data.splits import ImageDataset
from ..training.outputs.run_directory import write_json
from ..training.runtime.accelerator import device_name
from ..version import __version__
from .methods import exit_loss
from .opening import (
    MODEL_HELP,
    add_measuring_flags,
    add_model_flags,
    load_any_model,
    load_checkpoints,
    open_data,
    read_data,
)
from .record import Record, read_record
from .saved import saved_model

Report: TypeAlias = FlatMinimaReport | GradientReport | SeparabilityReport | AgreementReport
Figures: TypeAlias = dict[str, Any]
"""A report as JSON."""
NUMBER, NONE = (int, float), type(None)
SETTINGS = {
    "method": (str,),
    "temperature": NUMBER,
    "alpha": NUMBER,
    "beta": NUMBER,
    "hint": (str, NONE),
    "teacher": (str,),
    "t_squared": (bool,),
    "memory_momentum": NUMBER,
    "memory_share": NUMBER,
    "memory_warmup_epochs": (int,),
    "memory_topk": (int, NONE),
    "distill_loss_weight": (*NUMBER, NONE),
    "freeze_backbone": (bool,),
    "bce_loss": (bool,),
    "bce_sum": (bool,),
    "bce_target_thresh": (*NUMBER, NONE),
    "bce_pos_weight": (*NUMBER, NONE),
}
"""Settings of a run that its gradients depend on, and their types in config.json."""


def add_parsers(commands: Any) -> None:
    """Add the parsers of flat-minima, gradients, separability and agreement."""
    flat_minima = commands.add_parser("flat-minima", help="measure how accuracy falls with noise on the weights")
    gradients = commands.add_parser("gradients", help="measure the gradients in each stage of the backbone")
    separability = commands.add_parser(
        "separability", help="measure how well the features of each exit separate classes"
    )
    agreement = commands.add_parser("agreement", help="measure which exits make errors on the same images")
    for parser in (flat_minima, gradients):
        parser.add_argument(
            "models", nargs="+", metavar="model", help=f"{MODEL_HELP}; plain networks are accepted for comparison"
        )
        parser.add_argument("--revision", help="branch, tag or commit of all models")
    for parser in (separability, agreement):
        add_model_flags(parser)
    for parser in (flat_minima, gradients, separability, agreement):
        add_measuring_flags(parser)
        parser.add_argument(
            "--output",
            type=Path,
            metavar="DIR",
            default=Path("."),
            help="folder for the plot and the results as JSON (default: the current folder)",
        )
    flat_minima.add_argument(
        "--levels",
        type=float,
        nargs="+",
        metavar="NUMBER",
        help="sizes of the noise, relative to the root mean square of each weight tensor",
    )
    flat_minima.add_argument(
        "--unscaled", action="store_true", help="take --levels as standard deviations, the same for every weight"
    )
    flat_minima.add_argument(
        "--draws", type=int, default=5, help="number of noise samples per size (default: %(default)s)"
    )
    flat_minima.add_argument(
        "--noise-seed", type=int, default=0, metavar="SEED", help="random seed of the noise (default: %(default)s)"
    )
    gradients.add_argument(
        "--checkpoints",
        action="store_true",
        help="measure at each checkpoint in the run directories (train --checkpoint-hist sets how many are kept)",
    )
    separability.add_argument(
        "--classes", type=int, nargs="+", metavar="INDEX", help="classes in the plot (default: the first ten)"
    )


def flat_minima(args: argparse.Namespace) -> int:
    opened, data = _open(args, args.models)
    reports = {
        name: measure_flatness(
            model, loader, levels=args.levels, draws=args.draws, scaled=not args.unscaled, seed=args.noise_seed
        )
        for name, (model, loader, _) in opened.items()
    }
    _print_all(reports)
    return _write(
        args,
        data,
        "flat_minima_unscaled" if args.unscaled else "flat_minima",
        _figures(reports),
        lambda path: plot_flatness(path, reports),
    )


def gradients(args: argparse.Namespace) -> int:
    opened, data = _open(args, args.models)
    exits = next((model.exits for model, _, _ in opened.values() if isinstance(model, SelfDistillModel)), None)
    tasks = {name: _task(name, model, record) for name, (model, _, record) in opened.items()}

    def measure(name: str) -> GradientReport:
        return measure_gradients(tasks[name], opened[name][1], exits=exits)

    def figures(name: str, report: GradientReport) -> Figures:
        return {"criterion": repr(tasks[name].criterion), **report.to_dict()}

    if args.checkpoints:
        checkpoints = {name: load_checkpoints(model, Path(name)) for name, (model, _, _) in opened.items()}
        histories = {name: {update: measure(name) for update in updates} for name, updates in checkpoints.items()}
        return _write_history(args, data, histories, figures)
    reports = {name: measure(name) for name in opened}
    _print_all(reports)
    return _write(
        args,
        data,
        "gradients",
        {name: figures(name, report) for name, report in reports.items()},
        lambda path: plot_gradients(path, reports),
    )


def separability(args: argparse.Namespace) -> int:
    opened, data = _open(args, [args.model])
    model, loader, _ = opened[args.model]
    report = measure_separability(model, loader, classes=args.classes)
    Console(soft_wrap=True).print(report)
    names = as_timm(model).pretrained_cfg.get("label_names")
    return _write(
        args, data, "separability", _figures({args.model: report}), lambda path: plot_separability(path, report, names)
    )


def agreement(args: argparse.Namespace) -> int:
    opened, data = _open(args, [args.model])
    model, loader, _ = opened[args.model]
    report = measure_agreement(model, loader)
    Console(soft_wrap=True).print(report)
    return _write(args, data, "agreement", _figures({args.model: report}), lambda path: plot_agreement(path, report))


COMMANDS = {"flat-minima": flat_minima, "gradients": gradients, "separability": separability, "agreement": agreement}


def _open(
    args: argparse.Namespace,
    names: list[str],
) -> tuple[dict[str, tuple[nn.Module, MeasuredImages[ImageDataset], Record]], hub.ImageSource]:
    """Open models and images, and create the folder of --output; errors in any model are found before measuring.

    Returns:
        For each name its model on the device, the images preprocessed for it, and its record; and the source of the
        images, see `ImageSplits.source`.
    """
    records = {name: read_record(saved_model(name), args.revision) for name in names}
    images, opened = read_data(args, *records.values()), {}
    for name, record in records.items():
        model = load_any_model(record.model, record.revision).to(args.device)
        opened[name] = model, open_data(model, record, images, args), record
    for path in (args.output, *args.output.parents):
        if path.is_file():
            raise NotADirectoryError(f"{path} is a file; --output must be a folder")
    args.output.mkdir(parents=True, exist_ok=True)
    return opened, images.source


def _task(name: str, model: nn.Module, record: Record) -> TrainingTask:
    """Create the task of a model with the loss recorded in its files; cross entropy for a plain network. The ensemble
    stands in for a memory as teacher, which is not saved.

    Raises:
        ValueError: the backbone was frozen, or the record is damaged.
    """
    if not isinstance(model, SelfDistillModel):
        return ClassificationTask(model, nn.CrossEntropyLoss(), device=next(model.parameters()).device, verbose=False)
    folder = hub.fetch_model(record.model, revision=record.revision, only_config=True)
    path, metrics = folder / CONFIG, hub.read_metrics(folder)
    metrics = metrics if isinstance(metrics, dict) else {}
    settings = metrics.get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: settings must be an object, got {short(settings)}")
    for key, kinds in SETTINGS.items():
        if key in settings and type(settings[key]) not in kinds:
            raise ValueError(f"{path} is damaged: settings contain {key}={short(settings[key])}")
    if metrics.get("frozen") or settings.get("freeze_backbone"):
        raise ValueError(f"{name} was trained with a frozen backbone, which has no gradients")
    if settings.get("teacher") == "memory":
        settings = settings | {"teacher": "ensemble"}
    try:
        return SelfDistillTask(model, exit_loss(settings))
    except ValueError as error:
        raise ValueError(f"{path}: invalid settings: {error}") from error


def _write_history(
    args: argparse.Namespace,
    data: hub.ImageSource,
    histories: dict[str, dict[int, GradientReport]],
    figures: Callable[[str, GradientReport], Figures],
) -> int:
    """Print and write the reports by model and number of updates."""
    for name, history in histories.items():
        _print_all({f"{name}, {update} updates": report for update, report in history.items()})
    models = {
        name: [{"updates": update, **figures(name, report)} for update, report in history.items()]
        for name, history in histories.items()
    }
    return _write(
        args,
        data,
        "gradient_history",
        models,
        lambda path: plot_gradient_history(
            path,
            {name: list(history.values()) for name, history in histories.items()},
            {name: list(history) for name, history in histories.items()},
        ),
    )


def _print_all(reports: Mapping[str, Report]) -> None:
    console = Console(soft_wrap=True)
    for name, report in reports.items():
        console.print(name, markup=False, highlight=False)
        console.print(report)


def _figures(reports: Mapping[str, Report]) -> dict[str, Figures]:
    return {name: report.to_dict() for name, report in reports.items()}


def _write(
    args: argparse.Namespace,
    data: hub.ImageSource,
    stem: str,
    models: Mapping[str, Figures | list[Figures]],
    draw: Callable[[Path], None],
) -> int:
    """Write the results of each model as JSON, with the conditions of the measurement, and the plot.

    Args:
        data: see `ImageSplits.source`.
    """
    paths = [args.output / f"{stem}.json", args.output / f"{stem}.png"]
    write_json(
        paths[0],
        {
            "data": data,
            "batch_size": args.batch_size,
            "device": args.device,
            "hardware": device_name(args.device),
            "versions": {"timm_selfdistill": __version__, "torch": torch.__version__, "timm": timm.__version__},
            "models": models,
        },
    )
    draw(paths[1])
    print(f"wrote {paths[0]}, {paths[1]}")
    return 0
