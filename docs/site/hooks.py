"""What MkDocs does besides: links that leave docs/, the changelog, and the reference of the command line."""

import argparse
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^][]*(?:\[[^][]*\][^][]*)*)\]\((?!https?://|#)([^()\s]+)\)")
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.MULTILINE | re.DOTALL)
UNBROKEN = re.compile(r"(?<=\d) (?=±)|(?<=±) (?=\d)|(?<=\(p) (?=\d)")
"""Spaces at which a figure and its interval are not torn apart."""
COMMANDS = "<!-- commands -->"
CHANGELOG = "<!-- changelog -->"
NO_DEFAULT = (None, False, "", (), [], {}, argparse.SUPPRESS)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page, before it becomes HTML."""
    place = page.file.src_uri
    if CHANGELOG in markdown:
        return markdown.replace(CHANGELOG, changelog(repository()))
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_reference())
    return relink(markdown, f"docs/{place}", place, repository())


def repository() -> str | None:
    """The public address of the repository, which pyproject.toml tells as soon as there is one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search('^Repository = "(.+?)/?"$', text, re.MULTILINE)
    return address and address[1]


def changelog(address: str | None) -> str:
    """CHANGELOG.md of the repository, without its title."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return relink(text.removeprefix("# Changelog\n"), "CHANGELOG.md", "changelog.md", address)


def relink(markdown: str, source: str, page: str, address: str | None) -> str:
    """Links that are relative to a file of the repository, as they are right on a page of the site.

    A file outside docs/ is no page. With the repository's address the link goes there; without one, only its text and
    the file's name are left. Code stays as it is.

    Args:
        source: the file that the links are relative to, from the root of the repository.
        page: where the text is shown, from docs/.
    """

    def replace(link: re.Match) -> str:
        picture, text, target = link.groups()
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path.startswith("docs/"):
            text = title(path) if text == posixpath.basename(path) else text
            inside = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(page) or ".")
            return f"{picture}[{text}]({inside}{'#' + anchor if anchor else ''})"
        if address:
            return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/HEAD/{path})"
        if picture or posixpath.basename(path) in text:
            return f"`{path}`"
        return f"{text} (`{path}`)"

    kept: list[str] = []

    def keep(code: re.Match) -> str:
        kept.append(code[0])
        return f"\0{len(kept) - 1}\0"

    without_code = CODE.sub(keep, markdown)
    linked = UNBROKEN.sub("\u00a0", LINK.sub(replace, without_code))
    return re.sub("\0(\\d+)\0", lambda mark: kept[int(mark[1])], linked)


def title(path: str) -> str:
    """The first heading of a page, which stands for its name."""
    return (ROOT / path).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def on_page_content(html: str, **_: Any) -> str:
    """The HTML of a page: short code stays on one line, which a browser would break after the dashes of a flag."""
    return re.sub(r"(?<!</span>)<code>([^<]{1,24})</code>", r'<code class="short">\1</code>', html)


def command_reference() -> str:
    """A chapter for each command, made of the parsers that the commands themselves use."""
    from timm_selfdistill.cli import train_parser
    from timm_selfdistill.cli.main import _parser

    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    parsers = {**commands.choices, "train": train_parser(helps["train"])}
    return "\n".join(_chapter(name, helps[name], parser) for name, parser in parsers.items())


def _chapter(name: str, help: str, parser: argparse.ArgumentParser) -> str:
    first = [*parser._positionals._group_actions, *parser._optionals._group_actions]
    others = [group for group in parser._action_groups if group not in (parser._positionals, parser._optionals)]
    groups = {"": _shown(first), **{str(group.title): _shown(group._group_actions) for group in others}}
    arguments = [_value(action) for action in _shown(parser._actions) if not action.option_strings]
    flags = ["[FLAGS]"] if any(action.option_strings for action in _shown(parser._actions)) else []
    usage = " ".join(["timm-selfdistill", name, *arguments, *flags])
    lines = [
        f"## {name}",
        "",
        _flags_as_code(f"{help[:1].upper()}{help[1:].rstrip('.')}."),
        "",
        "```text",
        usage,
        "```",
        "",
    ]
    for title, actions in groups.items():
        if not actions:
            continue
        if title:
            lines += [f"### {name}: {title}", ""]
        rows = [f"| {_names(action)} | {_meaning(action, parser)} |" for action in actions]
        lines += ["| argument | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _shown(actions: Iterable[argparse.Action]) -> list[argparse.Action]:
    return [action for action in actions if action.help != argparse.SUPPRESS and action.dest != "help"]


def _value(action: argparse.Action) -> str:
    """What stands for the value, as in --help."""
    name = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    name = " ".join(name) if isinstance(name, tuple) else str(name)
    return {"+": f"{name} [{name} ...]", "?": f"[{name}]", "*": f"[{name} ...]"}.get(str(action.nargs), name)


def _names(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{_value(action)}`"
    names = ", ".join(f"`{flag}`" for flag in action.option_strings)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return names
    return f"{names} {'`' + _value(action) + '`' if not action.choices else _choices(action)}"


def _choices(action: argparse.Action) -> str:
    return " or ".join(f"`{choice}`" for choice in action.choices or ())


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    if "default" not in text and action.option_strings and action.default not in NO_DEFAULT:
        text += f" (default: {_default(action.default)})"
    text = text.strip().replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return _flags_as_code(text)


def _flags_as_code(text: str) -> str:
    return re.sub(r"(?<![\w-])--\w[\w-]*", lambda flag: f"`{flag[0]}`", text)


def _default(value: Any) -> str:
    if value is True:
        return "on"
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
