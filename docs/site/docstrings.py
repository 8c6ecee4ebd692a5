"""For the API reference: docstrings as Markdown has them, and the settings of a run."""

import inspect
import re
from typing import Any

import griffe

SETTINGS = "timm_selfdistill.training.config.TrainConfig"
"""Its fields are made by `setting(default, help)`, and their help is put into its docstring when it is imported."""
DEFAULT = re.compile(r"\s+Default:\s.*?\.(?=\n {4}\w+: |\n\n)", re.DOTALL)


class Docstrings(griffe.Extension):
    """Turns `::` before an indented block into `:`, and shows defaults of settings once, beside their types."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        if obj.path == SETTINGS:
            completed = inspect.cleandoc(griffe.dynamic_import(obj.path).__doc__)
            obj.docstring.value = DEFAULT.sub("", completed)
        obj.docstring.value = obj.docstring.value.replace("::\n\n", ":\n\n")

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        made = attr.value
        if isinstance(made, griffe.ExprCall) and str(made.function) == "setting":
            attr.value = made.arguments[0] if str(made.arguments[0]) != "dict" else "{}"
