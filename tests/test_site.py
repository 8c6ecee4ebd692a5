"""The pages as a site: what its hooks make of them, and that it builds."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from timm_selfdistill.cli.main import _parser

from .programs import HANGS, ROOT

spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/site/hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)
RESULTS = "See [figures](../benchmarks/results/step.json) and [benchmarks/results](../benchmarks/results)."


def commands() -> list[str]:
    (action,) = (action for action in _parser()._actions if action.dest == "command")
    return list(action.choices)


def test_the_reference_of_the_command_line_has_every_command():
    headings = re.findall("^## (.*)", hooks.command_reference(), re.MULTILINE)
    assert sorted(headings) == sorted(commands())
    assert len(headings) >= 12


@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("train", "| `--alpha` `ALPHA` |"),
        ("train", "| `-b`, `--batch-size` `BATCH_SIZE` |"),
        ("calibrate", "| `--max-accuracy-drop` `NUMBER` |"),
        ("export", "| `--format` `onnx` or `timm` |"),
        ("push", "| `[repo_id]` |"),
    ],
)
def test_the_reference_has_every_flag(command, row):
    chapter = re.search(f"^## {command}\n(.*?)(?=^## |\\Z)", hooks.command_reference(), re.MULTILINE | re.DOTALL)[1]
    assert row in chapter


def test_rows_of_the_reference_have_two_cells():
    for line in hooks.command_reference().splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, "See figures (`benchmarks/results/step.json`) and `benchmarks/results`."),
        (
            "https://example.org/repo",
            "See [figures](https://example.org/repo/blob/HEAD/benchmarks/results/step.json) and"
            " [benchmarks/results](https://example.org/repo/blob/HEAD/benchmarks/results).",
        ),
    ],
)
def test_links_that_leave_the_pages(address, expected):
    assert hooks.relink(RESULTS, "docs/training.md", "training.md", address) == expected


@pytest.mark.parametrize(
    ("text", "source", "page", "expected"),
    [
        ("[own](#part), [x](https://a.b)", "docs/faq.md", "faq.md", "[own](#part), [x](https://a.b)"),
        ("[a](../models.md#part)", "docs/guides/onnx.md", "guides/onnx.md", "[a](../models.md#part)"),
        ("[a](docs/models.md)", "CHANGELOG.md", "changelog.md", "[a](models.md)"),
        ("![a](images/a.png)", "docs/faq.md", "faq.md", "![a](images/a.png)"),
        ("[faq.md](faq.md)", "docs/hub.md", "hub.md", "[FAQ](faq.md)"),
        ("`[a](../b)`", "docs/hub.md", "hub.md", "`[a](../b)`"),
        ("```\n[a](../b)\n```", "docs/hub.md", "hub.md", "```\n[a](../b)\n```"),
    ],
)
def test_links_between_pages(text, source, page, expected):
    assert hooks.relink(text, source, page, None) == expected


class Page(HTMLParser):
    """What a page shows outside of code, and what it loads."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag in ("code", "pre", "script", "style"):
            self.open.append(tag)
        source = values.get("src") if tag in ("script", "img", "iframe") else None
        source = values.get("href") if tag == "link" and values.get("rel") != "canonical" else source
        if source:
            self.loaded.append(source)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, text: str) -> None:
        if not self.open:
            self.words.append(text)


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Strictly: a broken link or anchor, or a page that is in no menu, is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) >= 28
    for path in built:
        page = Page(path.read_text(encoding="utf-8"))
        assert not [source for source in page.loaded if "//" in source], path  # nothing comes from elsewhere
        text = "".join(page.words)
        for unrendered in ("```", "|---", "](", "<!--", "::: ", "{ ."):
            assert unrendered not in text, (path, unrendered)
