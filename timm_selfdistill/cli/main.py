"""timm-selfdistill: push a saved model to the Hub, or look at one."""
import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import hub
from ..model import SelfDistillModel
from ..training.config import check_repo_id
from .program import Parser, run


def main() -> None:
    """Entry point of the command."""
    run(lambda: _main(_parser().parse_args()))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="timm-selfdistill", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{push,info}", parser_class=Parser)
    push = commands.add_parser("push", help="upload a saved model to the Hub")
    push.add_argument("folder", type=Path, help="saved model, or a run directory, whose best/ is taken")
    push.add_argument("repo_id", help="user/name, or name")
    push.add_argument("--private", action="store_true", help="make a private repository")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    push.add_argument("--commit-message", metavar="TEXT", default="Upload self-distilled model")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    info = commands.add_parser("info", help="what is in a saved model")
    info.add_argument("model", help="folder, or id of a repository on the Hub")
    info.add_argument("--revision", help="branch, tag or commit")
    return parser


def _main(args: argparse.Namespace) -> int:
    if args.command == "push":
        _push(args)
    else:
        _info(args, Console(soft_wrap=True))
    return 0


def _push(args: argparse.Namespace) -> None:
    check_repo_id(args.repo_id)
    folder = args.folder / "best" if (args.folder / "best").is_dir() else args.folder
    try:
        print(hub.push_folder(
            folder, args.repo_id, commit_message=args.commit_message, private=args.private or None,
            revision=args.revision, create_pr=args.create_pr))
    except Exception as error:
        raise OSError(f"{folder} is not on the Hub: {hub.explain_failure(error, args.repo_id)}") from error


def _info(args: argparse.Namespace, console: Console) -> None:
    folder = hub.fetch_model(args.model, revision=args.revision, only_config=True)
    config = hub.read_config(folder)
    settings = config["self_distill"]
    height, width = config["pretrained_cfg"]["input_size"][1:]
    lines = [f"{args.model}: {config['architecture']}, {config['num_classes']} classes, {height} x {width} pixels,"
             f" {settings['head'] or 'own'} heads"]
    metrics = settings.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    if isinstance(metrics.get("dataset"), dict):
        lines.append(f"accuracy on {metrics['dataset'].get('name')}, split {metrics['dataset'].get('split')}")
    for line in lines:
        console.print(Text(line))
    if settings["head"]:
        with torch.device("meta"), hub.NoRandomInit():
            model = SelfDistillModel.from_config(config, folder)
        console.print(_table(model.card_rows(metrics)))
    for name, size in hub.file_sizes(args.model, args.revision).items():
        console.print(Text(f"{size / 1e6:10,.1f} MB  {name}"))


def _table(rows: list[dict]) -> Table:
    table = Table()
    forms = {"top1": "{:.2f}", "top5": "{:.2f}", "macs": "{:,}", "share": "{:.1%}", "speedup": "{:.2f}x"}
    for name in ("exit", "module", "top-1 %", "top-5 %", "MACs", "share", "speed-up"):
        table.add_column(name, justify="left" if name in ("exit", "module") else "right")
    for row in rows:
        numbers = [form.format(row[name]) if isinstance(row.get(name), (int, float)) else ""
                   for name, form in forms.items()]
        table.add_row(*(Text(str(row.get(name))) for name in ("exit", "module")), *numbers)
    return table
