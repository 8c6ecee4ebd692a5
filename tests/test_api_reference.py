"""Every public name has a page in the API reference, and an example there that runs."""

import doctest
import importlib
import inspect
import re
from functools import cache
from types import ModuleType
from typing import Any

import pytest

import timm_selfdistill

from .programs import ROOT

PAGES = sorted((ROOT / "docs/api").glob("*.md"))
MODULES = (
    "timm_selfdistill",
    *(f"timm_selfdistill.{name}" for name in ("training", "inference", "baselines", "analysis")),
)
"""Whose `__all__` is public. Of the rooms below them only what the pages name is."""
SLOW = ("export_onnx", "export_stages")
ON_PAGES = ("push_to_hub", "push_folder")
"""Whose examples are blocks of their page, since they need a Hub; test_docs.py runs those."""


@cache
def documented() -> dict[str, Any]:
    """What the pages show, by its dotted name."""
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
    return {name: find(name) for name in names}


def find(name: str) -> Any:
    module, parts = timm_selfdistill, name.split(".")[1:]
    found: Any = module
    for number, part in enumerate(parts, 1):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            importlib.import_module(".".join(["timm_selfdistill", *parts[:number]]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_page(module):
    shown = list(documented().values())
    public = importlib.import_module(module)
    missing = [name for name in public.__all__ if name != "__version__" and getattr(public, name) not in shown]
    assert not missing


def test_pages_show_each_name_once():
    shown = re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
    assert len(shown) == len(set(shown))


def test_every_module_has_its_line_on_the_first_page():
    first = (ROOT / "docs/api/index.md").read_text()
    for name in documented():
        parts = name.split(".")
        module = ".".join(part for part in parts[:-1] if part.islower())
        assert f"`{module}`" in first, name
        if module == "timm_selfdistill":
            assert f"[`{parts[-1]}`](" in first, name


def examples(name: str) -> list[doctest.DocTest]:
    """Those of a name and, of a class, of its own public methods."""
    found = documented()[name]
    finder, module = doctest.DocTestFinder(recurse=inspect.isclass(found)), inspect.getmodule(found)
    tests = finder.find(found, name=name, module=module, globs={})
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", sorted(documented()))
def test_every_page_entry_has_an_example(name):
    if name.split(".")[-1] in ON_PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api/hub.md").read_text(), re.MULTILINE | re.DOTALL)
        assert any(name.split(".")[-1] in block for block in blocks)
    else:
        assert any(test.name == name for test in examples(name))


class Checker(doctest.OutputChecker):
    """An example that shows no output may print something, such as the progress of a run."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.split(".")[-1] in SLOW else ())
        for name in sorted(documented())
    ],
)
def test_examples(name, workplace, monkeypatch, unrendered):
    monkeypatch.chdir(workplace)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for test in examples(name):
        report: list[str] = []
        doctest.DocTestRunner(Checker(), optionflags=flags).run(test, out=report.append)
        assert not report, "".join(report)
