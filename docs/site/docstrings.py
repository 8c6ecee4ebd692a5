"""For the API reference: docstrings as Markdown has them."""

import inspect
from typing import Any

import griffe

COMPLETED = {"timm_selfdistill.training.config.TrainConfig"}
"""Whose docstrings are completed when their module is imported; the source holds only a part of them."""


class Docstrings(griffe.Extension):
    """Turns `::` before an indented block into `:`, and takes completed docstrings from the imported module."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        if obj.path in COMPLETED:
            obj.docstring.value = inspect.cleandoc(griffe.dynamic_import(obj.path).__doc__)
        obj.docstring.value = obj.docstring.value.replace("::\n\n", ":\n\n")
