"""flat-minima, gradients, separability and agreement of the command `timm-selfdistill`."""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from timm.task import ClassificationTask, TrainingTask
from torch import nn
from torch.utils.data import DataLoader

from .. import hub
from ..analysis import (
    GradientReport,
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
from ..loss import SelfDistillLoss
from ..model import SelfDistillModel
from ..task import SelfDistillTask
from ..training.report import write_json
from .opening import (
    MODEL_HELP,
    add_data_flags,
    add_model_flags,
    load_any_model,
    load_checkpoints,
    open_data,
    read_data,
    saved_model,
)

LOSS_SETTINGS = ("temperature", "alpha", "beta", "hint", "teacher", "t_squared")


def add_parsers(commands: Any) -> None:
    """flat-minima, gradients, separability and agreement."""
    flat_minima = commands.add_parser("flat-minima", help="how accuracy falls with noise on the weights")
    gradients = commands.add_parser("gradients", help="how much of the loss reaches each section of the backbone")
    separability = commands.add_parser("separability", help="how well each exit's features tell the classes apart")
    agreement = commands.add_parser("agreement", help="which exits err on the same images")
    for parser in (flat_minima, gradients):
        parser.add_argument("models", nargs="+", metavar="model", help=f"{MODEL_HELP}; also plain networks, to compare")
        parser.add_argument("--revision", help="branch, tag or commit of them all")
    for parser in (separability, agreement):
        add_model_flags(parser)
    for parser in (flat_minima, gradients, separability, agreement):
        add_data_flags(parser)
        parser.add_argument("--output", type=Path, metavar="DIR", default=Path("."),
                            help="gets the picture and the figures as JSON (default: this folder)")
    flat_minima.add_argument("--levels", type=float, nargs="+", metavar="NUMBER",
                             help="sizes of the noise, over the root mean square of each tensor of weights")
    flat_minima.add_argument("--unscaled", action="store_true",
                             help="levels are standard deviations, the same for every weight")
    flat_minima.add_argument("--draws", type=int, default=5, help="of noise, for each level")
    flat_minima.add_argument("--seed", type=int, default=0, help="of the noise")
    gradients.add_argument("--checkpoints", action="store_true",
                           help="over training: at each checkpoint that the run directories hold (train.py's"
                                " --checkpoint-hist says how many)")
    separability.add_argument("--classes", type=int, nargs="+", metavar="INDEX",
                              help="in the picture (default: the first ten)")


def flat_minima(args: argparse.Namespace) -> int:
    images, reports = read_data(args), {}
    for name, model in _load_all(args).items():
        reports[name] = measure_flatness(
            model, open_data(model, images, args), levels=args.levels, draws=args.draws, scaled=not args.unscaled,
            seed=args.seed)
    _print_all(reports)
    return _write(args, "flat_minima_unscaled" if args.unscaled else "flat_minima", _figures(reports),
                  lambda path: plot_flatness(path, reports))


def gradients(args: argparse.Namespace) -> int:
    images, models = read_data(args), _load_all(args)
    exits = next((model.exits for model in models.values() if isinstance(model, SelfDistillModel)), None)

    def measure(name: str, model: nn.Module) -> GradientReport:
        task = _task(model, hub.fetch_model(saved_model(name), revision=args.revision, only_config=True))
        return measure_gradients(task, open_data(model, images, args), exits=exits)

    if args.checkpoints:
        return _gradient_history(args, models, measure)
    reports = {name: measure(name, model) for name, model in models.items()}
    _print_all(reports)
    return _write(args, "gradients", _figures(reports), lambda path: plot_gradients(path, reports))


def _gradient_history(
        args: argparse.Namespace, models: dict[str, nn.Module], measure: Callable[[str, nn.Module], GradientReport],
) -> int:
    histories = {name: {update: measure(name, model) for update in load_checkpoints(model, Path(name))}
                 for name, model in models.items()}
    for name, history in histories.items():
        _print_all({f"{name}, {update} updates": report for update, report in history.items()})
    figures = {name: [{"updates": update, **report.to_dict()} for update, report in history.items()]
               for name, history in histories.items()}
    return _write(args, "gradient_history", figures, lambda path: plot_gradient_history(
        path, {name: list(history.values()) for name, history in histories.items()},
        {name: list(history) for name, history in histories.items()}))


def separability(args: argparse.Namespace) -> int:
    model, loader = _open(args)
    report = measure_separability(model, loader, classes=args.classes)
    Console(soft_wrap=True).print(report)
    names = model.backbone.pretrained_cfg.get("label_names")
    return _write(args, "separability", _figures({args.model: report}),
                  lambda path: plot_separability(path, report, names))


def agreement(args: argparse.Namespace) -> int:
    model, loader = _open(args)
    report = measure_agreement(model, loader)
    Console(soft_wrap=True).print(report)
    return _write(args, "agreement", _figures({args.model: report}), lambda path: plot_agreement(path, report))


COMMANDS = {"flat-minima": flat_minima, "gradients": gradients, "separability": separability, "agreement": agreement}


def _open(args: argparse.Namespace) -> tuple[nn.Module, DataLoader]:
    """The model on its device, and its data."""
    args.model = saved_model(args.model)
    model = load_any_model(args.model, args.revision)
    return model.to(args.device), open_data(model, read_data(args), args)


def _load_all(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The models on their device, by the names that they were given."""
    return {name: load_any_model(saved_model(name), args.revision).to(args.device)
            for name in dict.fromkeys(args.models)}


def _task(model: nn.Module, folder: Path) -> TrainingTask:
    """A model with the loss that it was trained with, as far as its files tell."""
    if not isinstance(model, SelfDistillModel):
        return ClassificationTask(model, nn.CrossEntropyLoss(), device=next(model.parameters()).device, verbose=False)
    metrics = hub.read_metrics(folder)
    recorded = metrics.get("settings") if isinstance(metrics, dict) else None
    settings = {key: recorded[key] for key in LOSS_SETTINGS if key in recorded} if isinstance(recorded, dict) else {}
    if settings.get("hint") == "none":
        settings["hint"] = None
    return SelfDistillTask(model, SelfDistillLoss(**settings))


def _print_all(reports: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    for name, report in reports.items():
        console.print(name, markup=False, highlight=False)
        console.print(report)


def _figures(reports: dict[str, Any]) -> dict[str, Any]:
    return {name: report.to_dict() for name, report in reports.items()}


def _write(args: argparse.Namespace, stem: str, models: dict[str, Any], draw: Callable[[Path], None]) -> int:
    """The figures of each model as JSON, and their picture."""
    args.output.mkdir(parents=True, exist_ok=True)
    paths = [args.output / f"{stem}.json", args.output / f"{stem}.png"]
    write_json(paths[0], {"data": args.data, "split": args.split, "models": models})
    draw(paths[1])
    print(f"wrote {paths[0]}, {paths[1]}")
    return 0
