"""What a setting is: its help, bounds and choices, from which validation, command line and documentation are made."""

import re
import textwrap
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Setting:
    """The metadata of a field.

    Attributes:
        help: what it is. Names of other settings stand in braces, which become flags on the command line.
        bounds: ">= 1", "> 0", or an interval such as "[0, 1)"; None is allowed where the default is None.
        whole: whether it counts something.
        choices: all that it may be.
        flags: short forms of its flag.
        otherwise: what it is where it is not given, if the default does not tell.
    """

    help: str
    bounds: str = ""
    whole: bool = False
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    otherwise: str = ""

    def text(self, as_flags: bool = False) -> str:
        """The help, with the names of other settings as they are in Python, or on the command line."""
        text = f"{self.help} (default: {self.otherwise})" if self.otherwise else self.help
        return re.sub(r"{(\w+)}", lambda name: f"--{name[1].replace('_', '-')}" if as_flags else name[1], text)


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass with a `Setting`; the default may be a class that makes it."""
    described = {"setting": Setting(help, **metadata)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=described)
    return field(default=default, metadata=described)


def described_fields(config: Any) -> list[tuple[Field, Setting]]:
    """Those of a dataclass that are settings."""
    return [(entry, entry.metadata["setting"]) for entry in fields(config) if "setting" in entry.metadata]


@cache
def _types(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def element_type(config: type, name: str) -> type:
    """The type of one value of a field: int of `int | None` and of `tuple[int, ...]`."""
    found = _types(config)[name]
    while get_args(found):
        found = next(part for part in get_args(found) if part not in (type(None), Ellipsis))
    return found


def takes_several(config: type, name: str) -> bool:
    """Whether a field is a tuple."""
    found = _types(config)[name]
    return any(getattr(part, "__origin__", None) is tuple for part in (found, *get_args(found)))


def check_setting(name: str, value: Any, described: Setting, optional: bool) -> Any:
    """A value as it is kept: a float that counts something becomes an int.

    Raises:
        ValueError: it is out of its bounds, or none of its choices.
    """
    if value is None and optional:
        return None
    if described.choices and value not in described.choices:
        raise ValueError(f"{name} must be one of {', '.join(described.choices)}, got {value!r}")
    if described.whole:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(f"{name} must be a whole number, got {value}")
        value = int(value) if isinstance(value, float) else value
    if described.bounds and described.whole and not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if described.bounds and not (is_number(value) and _inside(value, described.bounds)):
        raise ValueError(f"{name} must {_words(described)}, got {value!r}")
    return value


def _words(described: Setting) -> str:
    """For example "lie in [0, 1)", "be a number >= 0", "be at least 1"."""
    if described.bounds[0] in "[(":
        return f"lie in {described.bounds}"
    if described.whole and described.bounds != ">= 0":
        return f"be at least {described.bounds.removeprefix('>= ')}"
    return f"be a number {described.bounds}"


def _inside(value: float, bounds: str) -> bool:
    if bounds[0] in "[(":
        low, high = map(float, bounds[1:-1].split(","))
        above = value >= low if bounds[0] == "[" else value > low
        return above and (value <= high if bounds[-1] == "]" else value < high)
    sign, bound = bounds.split()
    return (value >= float(bound) if sign == ">=" else value > float(bound)) and value < float("inf")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def documented(config: type) -> type:
    """Put the help of a dataclass's settings into its docstring, under "Args:"."""
    lines = []
    for entry, described in described_fields(config):
        default = "" if entry.default is MISSING else f" Default: {entry.default!r}."
        text = f"{entry.name}: {described.text()}.{'' if described.otherwise else default}"
        lines += textwrap.wrap(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 12)
    config.__doc__ = (config.__doc__ or "").replace("    Args:\n", "    Args:\n" + "\n".join(lines) + "\n", 1)
    return config
