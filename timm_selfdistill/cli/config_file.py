"""YAML files of flags, which are read as if typed on the command line."""

import argparse
import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from timm.utils import ParseKwargs

from .timm_file import is_timm_file, translate

RECORDED = ("found", "value_ranges")
"""Entries of a run's config.yaml that are not flags, see `found_settings`."""


def read_flags(parser: argparse.ArgumentParser, path: Path, leave_out: Collection[str] = ()) -> list[str]:
    """Return the flags of a YAML file, to be inserted before the command line.

    Args:
        parser: parser of the flags; each key of the file is a flag's long name, with dashes or underscores.
        leave_out: names (with underscores) to skip.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a YAML mapping of flags to values, has an unknown or duplicate flag, or a value is
            invalid.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --config takes a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map flags to values, as in 'lr: 0.1', got {type(values).__name__}")
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # a switch's own flag precedes the one that turns it off
    known = actions.keys() - {"help", "config"}
    if is_timm_file(values):
        values = translate(values, path, known - {"data"})
    if RECORDED[0] in values and values.get("lr_base") is not None:
        values.pop("lr", None)  # the run computed lr from lr_base
    flags, seen = [], set()
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in RECORDED or (name == "resume" and RECORDED[0] in values):  # its config does not resume a run
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0].replace('_', '-')}?" if close else ""
            raise ValueError(f"{path}: unknown flag {key!r}{hint}")
        if name in seen:
            raise ValueError(f"{path}: {key} is given twice, with a dash and with an underscore")
        seen.add(name)
        if name not in leave_out:
            flags += _as_flag(actions[name], value, f"{path}: {key}")
    try:
        parser.parse_args(flags)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return flags


def _as_flag(action: argparse.Action, value: Any, where: str) -> list[str]:
    """Return the command-line arguments for a value of the file."""
    if value is None or value == [] or value == {}:
        if action.default:
            raise ValueError(f"{where} must have a value, got {value!r}; leave it out for the default {action.default}")
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return list(action.option_strings[:1] if value else action.option_strings[1:])
    if action.nargs == "?" and action.const is not None and isinstance(value, bool):
        return list(action.option_strings[-1:]) if value else []
    if isinstance(action, ParseKwargs) and isinstance(value, dict):
        return [action.option_strings[-1], *(f"{key}={entry!r}" for key, entry in value.items())]
    single = action.nargs in (None, "?")
    if isinstance(value, (bool, dict)) or (isinstance(value, list) and single):
        raise ValueError(f"{where} takes {'one value' if single else 'values'}, got {value!r}")
    flag = action.option_strings[-1]
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
