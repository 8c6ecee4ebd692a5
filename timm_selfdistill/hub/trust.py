"""A repository from a stranger is data: what is checked before anything is built from it, and before memory is taken.

Nothing is unpickled, imported or executed that a repository names. A config may ask only for a network that timm itself
registers, with plain values as arguments, and within the limits below.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

MAX_CONFIG_BYTES = 16 * 2**20
MAX_CLASSES = 100_000
MAX_NUMBER = 65_536
"""Highest number among the arguments of model and heads: widths, ..."""
MAX_PIXELS = 4_096
"""Highest width and height of images."""
MAX_HEADER_BYTES = 16 * 2**20
"""Of a safetensors file: names and shapes; timm's largest models have less than 1 MB."""
MAX_DEPTH = 512
"""Highest sum of the arguments that say how many blocks or layers a network has."""
MAX_ITEMS = 256
"""Most values among the arguments of a model or a head."""
MAX_TEXT = 10_000
"""Most characters of a text."""

PICKLES = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".pth.tar")
"""Ends of the names of files that are unpickled to be read."""

# Arguments of `timm.create_model` that load, name files or change what is built, instead of describing a network.
FORBIDDEN_ARGS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "model_name",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
    "out_indices",
    "feature_cls",
    "feature_cfg",
    "model_cfg",
    "cfg",
    "kwargs_filter",
    "device",
    "dtype",
}
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def check_names(names: Iterable[str], weights: str, where: str | Path) -> None:
    """Refuse a folder or repository whose weights are there only in files that would have to be unpickled. Beside the
    weights such files are of no concern: nothing reads them.

    Args:
        weights: name of the safetensors file that the weights should be in.

    Raises:
        ValueError: it has no such file, but a pickle.
    """
    names = set(names)
    pickles = sorted(name for name in names if name.lower().endswith(PICKLES))
    if pickles and weights not in names:
        raise ValueError(
            f"{where} has no {weights}, only {short(pickles[0])}, which may run code when it is read; save the model"
            " with save_pretrained, which writes safetensors files"
        )


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that are links out of the folder; those of the Hub's cache lead to its blobs.

    Raises:
        ValueError: one does.
    """
    inside = folder.resolve()
    cache = inside.parents[1] / "blobs" if inside.parent.name == "snapshots" else inside
    for name in names:
        target = Path(os.path.realpath(folder / name))
        if inside not in target.parents and cache not in target.parents:
            raise ValueError(f"{folder / name} is a link that leads out of its folder, to {target}; put the file there")


def read_json(path: Path) -> Any:
    """A JSON file of bounded size and depth, strictly read: no NaN, no infinity, no key twice.

    Raises:
        ValueError: it is too large or too deep, or no JSON.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {MAX_CONFIG_BYTES} that are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {short(key)} occurs twice")
        values[key] = value
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def check_network(config: dict[str, Any], path: Path) -> None:
    """Refuse a config that asks for anything but a timm network of bounded size.

    Raises:
        ValueError: it does.
    """
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{path}: architecture must be the name of a timm model, got {short(architecture)}")
    classes = config.get("num_classes")
    if isinstance(classes, bool) or not isinstance(classes, int) or not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"{path}: num_classes must be 1 to {MAX_CLASSES}, got {short(classes)}")
    model_args = config.get("model_args") or {}
    if not isinstance(model_args, dict):
        raise ValueError(f"{path}: model_args must be an object, got {short(model_args)}")
    forbidden = sorted(FORBIDDEN_ARGS & model_args.keys())
    if forbidden:
        raise ValueError(f"{path}: model_args may describe the network only, not set {', '.join(forbidden)}")
    if model_args.get("num_classes", classes) != classes:
        raise ValueError(f"{path} has {classes} classes, but {short(model_args['num_classes'])} in model_args")
    preprocessing(config, path)
    _check_values({key: value for key, value in model_args.items() if key != "num_classes"}, f"{path}: model_args")


def check_exits(settings: dict[str, Any], path: Path) -> None:
    """Refuse exits and heads beyond the limits.

    Args:
        settings: "self_distill" of a config.

    Raises:
        ValueError: they are.
    """
    if len(settings["exits"]) > MAX_ITEMS:
        raise ValueError(f"{path}: {len(settings['exits'])} exits are more than {MAX_ITEMS}")
    if not all(type(exit) is int and 0 <= exit <= MAX_DEPTH for exit in settings["exits"]):
        raise ValueError(f"{path}: exits must be feature_info indices, got {short(settings['exits'])}")
    _check_values(settings["head_args"], f"{path}: head_args")
    early_exit = settings.get("early_exit")
    if early_exit is not None and not isinstance(early_exit, dict):
        raise ValueError(f"{path}: early_exit must be an object, got {short(early_exit)}")


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_printable(value: Any) -> bool:
    """Nothing that could steer a terminal."""
    return _is_word(value) and value.isprintable()


def _are_numbers(
    value: Any, lengths: tuple[int, ...], low: float, high: float, kind: type[int] | tuple[type[int], type[float]]
) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in lengths
        and all(isinstance(item, kind) and not isinstance(item, bool) and low <= item <= high for item in value)
    )


def _are_words(value: Any) -> bool:
    several = isinstance(value, (list, tuple)) and len(value) <= MAX_ITEMS
    return _is_word(value) or (several and all(map(_is_word, value)))


CHANNELS = tuple(range(1, 257))
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")
CROP_MODES = ("center", "squash", "border")
PREPROCESSING: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("input_size", "test_input_size", "min_input_size"),
        (
            lambda value: _are_numbers(value, (3,), 1, MAX_PIXELS, int),
            f"channels, height and width, at most {MAX_PIXELS} pixels",
        ),
    ),
    **dict.fromkeys(
        ("pool_size", "test_pool_size"),
        (lambda value: _are_numbers(value, (2,), 0, MAX_PIXELS, int), "height and width"),
    ),
    "mean": (lambda value: _are_numbers(value, CHANNELS, 0, 255, (int, float)), "a number for each channel"),
    "std": (lambda value: _are_numbers(value, CHANNELS, 1e-3, 255, (int, float)), "a number above 0 for each channel"),
    **dict.fromkeys(
        ("crop_pct", "test_crop_pct"),
        (lambda value: _are_numbers([value], (1,), 0.1, 2, (int, float)), "a number from 0.1 to 2"),
    ),
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_mode": (lambda value: value in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("tag", "license", "description", "origin_url", "paper_name"), (_is_word, "a text")),
    **dict.fromkeys(("first_conv", "classifier", "paper_ids", "notes"), (_are_words, "a text or a list of them")),
}
"""What timm's PretrainedCfg holds, but for where weights come from: when a value is right, and in words."""


def preprocessing(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """timm's pretrained_cfg of a config: images and class names, nothing that names weights or files.

    Raises:
        ValueError: a value is of another kind than timm's.
    """
    values, classes = config.get("pretrained_cfg"), config["num_classes"]
    if not isinstance(values, dict) or values.get("input_size") is None:
        raise ValueError(f"{path}: pretrained_cfg must be an object with an input_size, got {short(values)}")
    known = {
        key: tuple(values[key]) if isinstance(values[key], list) else values[key]
        for key in PREPROCESSING
        if values.get(key) is not None
    }
    for key, value in known.items():
        fits, words = PREPROCESSING[key]
        if not fits(value):
            raise ValueError(f"{path}: pretrained_cfg has {key}={short(value)}, expected {words}")
    names = config.get("label_names", values.get("label_names"))
    if names is not None:
        if not isinstance(names, list) or len(names) != classes or not all(map(_is_printable, names)):
            raise ValueError(f"{path}: label_names must hold {classes} printable names, got {short(names)}")
        known["label_names"] = names
    for key in ("mean", "std"):
        if key in known and len(known[key]) not in (1, known["input_size"][0]):
            raise ValueError(f"{path}: {key} has {len(known[key])} values for {known['input_size'][0]} channels")
    return known | {"num_classes": classes, "architecture": config["architecture"]}


def _check_values(values: dict[str, Any], where: str) -> None:
    """Plain values only: null, booleans, bounded numbers, short strings, and lists of them."""
    depth, items = 0, 0
    for key, value in values.items():
        for item in _flatten(value, where):
            items += 1
            number = isinstance(item, (int, float)) and not isinstance(item, bool)
            most = MAX_PIXELS if key.endswith("img_size") else MAX_NUMBER
            if number and not abs(item) <= most:
                raise ValueError(f"{where}: {short(key)} must be at most {most}, got {short(item)}")
            if isinstance(item, str) and (len(item) > 100 or "/" in item or "\\" in item or ":" in item):
                raise ValueError(f"{where}: {short(key)} must be a plain word, got {short(item)}")
            if number and any(word in key for word in ("depth", "layer", "block", "repeat")):
                depth += item
    if items > MAX_ITEMS or depth > MAX_DEPTH:
        raise ValueError(
            f"{where} has {items} values and asks for {depth} blocks or layers; at most {MAX_ITEMS} and {MAX_DEPTH}"
        )


def _flatten(value: Any, where: str, level: int = 0) -> list[Any]:
    if isinstance(value, list) and level < 3:
        return [item for part in value for item in _flatten(part, where, level + 1)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return [value]
    raise ValueError(f"{where} may hold plain values only, got {short(value)}")


def check_tensors(path: Path, module: nn.Module) -> None:
    """Compare a safetensors file's header with a module, which may be on the meta device; no tensor is read.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or holds tensors of other names, shapes or kinds.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, so the folder is not a complete saved model; save or download it again"
        )
    expected = {key: (tuple(value.shape), value.dtype) for key, value in module.state_dict().items()}
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    try:
        if header > min(path.stat().st_size, MAX_HEADER_BYTES):
            raise ValueError(f"a header of {header} bytes")
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if len(names) > len(expected) + MAX_ITEMS:
                raise ValueError(f"{len(names)} tensors instead of {len(expected)}")
            found = {key: file.get_slice(key) for key in names}
            found = {key: (tuple(part.get_shape()), DTYPES.get(part.get_dtype())) for key, part in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({short(str(error))}); fetch or save it again"
        ) from error
    missing, foreign = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or foreign:
        raise ValueError(
            f"{path} does not hold this model's tensors: {len(missing)} missing {missing[:3]},"
            f" {len(foreign)} foreign {short(foreign[:3])}"
        )
    for key, (shape, dtype) in found.items():
        wanted_shape, wanted_dtype = expected[key]
        if shape != wanted_shape:
            raise ValueError(f"{path}: {key} has shape {shape}, expected {wanted_shape}")
        is_float = dtype is not None and "float" in dtype
        if dtype is None or is_float != wanted_dtype.is_floating_point:
            raise ValueError(f"{path}: {key} holds {dtype or 'numbers of an unknown kind'}, expected {wanted_dtype}")


def short(value: Any) -> str:
    """A value from outside for an error: at most 80 characters, none that could steer a terminal."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
