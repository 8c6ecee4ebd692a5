"""Train self-distilled timm models, and evaluate, calibrate, export, try out and share saved ones."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import hub
from ..training.config import check_repo_id
from ..truncated import saved_class
from ..version import __version__
from . import analysis, inference
from .demo import TRADEOFF_HELP, add_demo_flags, demo, push_space
from .opening import MODEL_HELP, add_model_flags
from .predict import add_predict_flags, predict
from .program import Parser, printable, run
from .recipes import print_recipes
from .saved import saved_model
from .train import DESCRIPTION, train

COLUMNS = {
    "exit": "{}",
    "module": "{}",
    "top1": "{:.2f}",
    "top5": "{:.2f}",
    "macs": "{:,.1f}",
    "share": "{:.1%}",
    "speedup": "{:.2f}x",
}


def main() -> None:
    """Entry point of the command."""
    argv = sys.argv[1:]
    if argv[:1] == ["train"]:  # its flags may also come from a file
        run(lambda: train(argv[1:], prog="timm-selfdistill train"))
    run(lambda: _main(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="timm-selfdistill", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands.add_parser("train", help=DESCRIPTION, add_help=False)
    commands.add_parser("recipes", help="list the recipes for train --config NAME")
    predicting = commands.add_parser("predict", help="classify images")
    predicting.add_argument("model", help=MODEL_HELP)
    predicting.add_argument("image", nargs="+", help="image file in any format that Pillow reads")
    add_predict_flags(predicting)
    add_demo_flags(commands.add_parser("demo", help="try a model in a web page on this machine"))
    _add_push_flags(commands.add_parser("push", help="upload a saved model, or a demo of it, to the Hub"))
    info = commands.add_parser("info", help="show the contents of a saved model")
    add_model_flags(info)
    inference.add_parsers(commands)
    analysis.add_parsers(commands)
    return parser


def _add_push_flags(push: argparse.ArgumentParser) -> None:
    push.add_argument("folder", help="saved model, or run directory, of which best/ is uploaded")
    push.add_argument("repo_id", nargs="?", help="repository for the model, user/name or name")
    push.add_argument("--space", metavar="USER/NAME", help="upload the page of `demo`, with the model, as this Space")
    push.add_argument("--tradeoff", type=Path, metavar="DIR", help=f"with --space, {TRADEOFF_HELP}")
    push.add_argument("--private", action="store_true", help="create a private repository")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit the model to (default: main)")
    push.add_argument(
        "--commit-message",
        metavar="TEXT",
        default="Upload self-distilled model",
        help="commit message for the model (default: %(default)s)",
    )
    push.add_argument("--create-pr", action="store_true", help="open a pull request with the model")


def _main(args: argparse.Namespace) -> int:
    if args.command == "push":
        _push(args)
        return 0
    if args.command == "recipes":
        print_recipes()
        return 0
    if args.command == "predict":
        return predict(args)
    if args.command == "demo":
        return demo(args)
    if args.command in analysis.COMMANDS:
        return analysis.COMMANDS[args.command](args)
    args.model = saved_model(args.model)
    if args.command == "info":
        _info(args.model, args.revision)
        return 0
    return getattr(inference, args.command)(args)


def _push(args: argparse.Namespace) -> None:
    if not args.repo_id and not args.space:
        raise ValueError(
            f"push {args.folder} needs a destination: give USER/NAME for the model, --space USER/NAME, or both"
        )
    if args.tradeoff and not args.space:
        raise ValueError(f"--tradeoff {args.tradeoff} needs --space USER/NAME, whose page shows it; add it")
    for name, value in (("repo_id", args.repo_id), ("--space", args.space)):
        if value:
            check_repo_id(value, name)
    folder, private = saved_model(args.folder), args.private or None
    if args.repo_id:
        with _named_failures(folder, args.repo_id):
            print(
                hub.push_folder(
                    folder,
                    args.repo_id,
                    commit_message=args.commit_message,
                    private=private,
                    revision=args.revision,
                    create_pr=args.create_pr,
                )
            )
    if args.space:
        with _named_failures(f"the page of {folder}", args.space):
            print(push_space(folder, args.space, args.tradeoff, private=private))


@contextmanager
def _named_failures(what: str, repo_id: str) -> Iterator[None]:
    """Context manager that turns any error of an upload into an OSError with one line of explanation."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{what} was not uploaded: {hub.explain_failure(error, repo_id)}") from error


def _info(model: str, revision: str | None) -> None:
    folder = hub.fetch_model(model, revision=revision, only_config=True)
    config = hub.read_network(folder)
    head, heads = None, ""
    if "self_distill" in config:
        head = hub.read_config(folder)["self_distill"]["head"]
        heads = f", {head or 'own'} heads"
    height, width = config["pretrained_cfg"]["input_size"][1:]
    one = hub.facts(config).get("truncated_to")
    print(
        printable(
            f"{model}: {config['architecture']}, {config['num_classes']} classes, {height} x {width} pixels"
            f"{heads}{'' if one is None else f', truncated to exit {one}'}"
        )
    )
    early_exit = hub.facts(config).get("early_exit")
    if isinstance(early_exit, dict):
        print(printable(f"early exit: {early_exit.get('policy')}, thresholds {early_exit.get('thresholds')}"[:200]))
    metrics = hub.facts(config).get("metrics")
    dataset = metrics.get("dataset") if isinstance(metrics, dict) else None
    if isinstance(dataset, dict):
        print(printable(f"accuracy on {dataset.get('name')}, split {dataset.get('split')}"[:200]))
    rows = saved_class(config).sketch(config, folder).card_rows(metrics) if head else hub.measured_rows(metrics)
    if rows:
        Console(soft_wrap=True).print(_table(rows))
    for name, size in hub.file_sizes(model, hub.pin(model, folder, revision)).items():
        print(f"{size / 1e6:10,.1f} MB  {name}")


def _table(rows: list[hub.ExitRow]) -> Table:
    table = Table("exit", "stage")
    for name in ("top-1 %", "top-5 %", "MACs (M)", "share", "speed-up"):
        table.add_column(name, justify="right")
    for row in rows:
        values: Mapping[str, Any] = {**row, "macs": row["macs"] / 1e6} if "macs" in row else row
        cells = (form.format(values[name]) if name in values else "" for name, form in COLUMNS.items())
        table.add_row(*(Text(printable(cell[:40])) for cell in cells))
    return table
