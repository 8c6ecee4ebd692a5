"""Checks of an untrusted repository, made before a network is built from it and before memory is taken.

Nothing that a repository names is unpickled, imported or executed. A config may ask only for a network that timm itself
registers, with plain values as arguments; the tensors of its files must be those of that network on the meta device.
"""

import json
import os
from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import build_model_with_cfg
from torch import nn

# What must be bounded before there is a network whose tensors could be compared with those of the files.
MAX_JSON_BYTES = 16 * 2**20
"""Bounds text that is parsed: config.json, the header of a safetensors file (timm's largest have less than 1 MB)."""
MAX_STEPS = 3 * 2**14
"""Bounds the time of building a network: the sum of its arguments, and the calls of torch (timm's largest: 32,000)."""
MAX_SPARE = 2**28
"""Bounds the memory that no file accounts for: bytes of an image, bytes that a network takes beside its weights (timm's
largest: 200 MB), elements of a tensor that is made while building it."""

PICKLES = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".pth.tar")
"""Ends of the names of files that are unpickled to be read."""

# Arguments that load, name files or change what is built, instead of describing a network.
FORBIDDEN_ARGS = {
    *signature(timm.create_model).parameters,
    *signature(build_model_with_cfg).parameters,
    *("pretrained_model_args", "features_only", "out_indices", "feature_cls", "cfg", "device", "dtype"),
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
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that are read")
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
    """Refuse a config that asks for anything but a timm network described by plain values.

    Raises:
        ValueError: it does.
    """
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{path}: architecture must be the name of a timm model, got {short(architecture)}")
    classes = config.get("num_classes")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(f"{path}: num_classes must be a whole number above 0, got {short(classes)}")
    model_args = config.get("model_args") or {}
    if not isinstance(model_args, dict):
        raise ValueError(f"{path}: model_args must be an object, got {short(model_args)}")
    forbidden = sorted(FORBIDDEN_ARGS & model_args.keys())
    if forbidden:
        raise ValueError(f"{path}: model_args may describe the network only, not set {', '.join(forbidden)}")
    if model_args.get("num_classes", classes) != classes:
        raise ValueError(f"{path} has {classes} classes, but {short(model_args['num_classes'])} in model_args")
    preprocessing(config, path)
    _check_arguments({key: value for key, value in model_args.items() if key != "num_classes"}, f"{path}: model_args")


def check_exits(settings: dict[str, Any], path: Path) -> None:
    """Refuse exits that are not numbers of levels, and arguments of heads that are not plain values.

    Args:
        settings: "self_distill" of a config.

    Raises:
        ValueError: they are.
    """
    exits = settings["exits"]
    if not all(type(exit) is int and 0 <= exit < MAX_STEPS for exit in exits) or exits != sorted(set(exits)):
        raise ValueError(f"{path}: exits must be ascending feature_info indices, got {short(exits)}")
    _check_arguments(settings["head_args"], f"{path}: head_args")
    early_exit = settings.get("early_exit")
    if early_exit is not None and not isinstance(early_exit, dict):
        raise ValueError(f"{path}: early_exit must be an object, got {short(early_exit)}")


def _are_integers(value: Any, length: int, low: int) -> bool:
    integers = isinstance(value, tuple) and all(type(item) is int and item >= low for item in value)
    return integers and len(value) == length


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _are_intensities(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_number(item, 0, 255) for item in value)


def _are_texts(value: Any) -> bool:
    return all(isinstance(item, str) for item in (value if isinstance(value, tuple) else (value,)))


INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")
CROP_MODES = ("center", "squash", "border")
IMAGE_SIZES = ("input_size", "test_input_size", "min_input_size")
CROPS = ("crop_pct", "test_crop_pct")
TEXTS = ("tag", "license", "description", "origin_url", "paper_name", "first_conv", "classifier", "paper_ids", "notes")
PREPROCESSING: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(IMAGE_SIZES, (lambda value: _are_integers(value, 3, 1), "channels, height and width")),
    **dict.fromkeys(("pool_size", "test_pool_size"), (lambda value: _are_integers(value, 2, 0), "height and width")),
    "mean": (_are_intensities, "a number from 0 to 255 for each channel"),
    "std": (lambda value: _are_intensities(value) and all(value), "a number above 0, at most 255, for each channel"),
    **dict.fromkeys(CROPS, (lambda value: _is_number(value, 0.1, 2), "a number from 0.1 to 2")),
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_mode": (lambda value: value in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(TEXTS, (_are_texts, "a text or a list of them")),
}
"""The fields of timm's PretrainedCfg, except where weights come from: what holds for valid values, and in words."""


def preprocessing(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """timm's pretrained_cfg of a config: images and class names, nothing that names weights or files.

    Raises:
        ValueError: a value is of another kind than timm's.
    """
    values, classes = config.get("pretrained_cfg"), config["num_classes"]
    if not isinstance(values, dict) or values.get("input_size") is None:
        raise ValueError(f"{path}: pretrained_cfg must be an object with an input_size, got {short(values)}")
    known: dict[str, Any] = {
        key: tuple(values[key]) if isinstance(values[key], list) else values[key]
        for key in PREPROCESSING
        if values.get(key) is not None
    }
    for key, value in known.items():
        fits, words = PREPROCESSING[key]
        if not fits(value):
            raise ValueError(f"{path}: pretrained_cfg has {key}={short(value)}, expected {words}")
    crop = min((known[key] for key in CROPS if key in known), default=1)
    for key in IMAGE_SIZES:
        channels, height, width = known.get(key, (0, 0, 0))
        if 4 * channels * height * width > MAX_SPARE * min(crop, 1) ** 2:  # float32, resized before it is cropped
            raise ValueError(
                f"{path}: pretrained_cfg has {key}={short(known[key])}, an image of more than {MAX_SPARE} bytes"
            )
    for key in ("mean", "std"):
        if key in known and len(known[key]) not in (1, known["input_size"][0]):
            raise ValueError(f"{path}: {key} has {len(known[key])} values for {known['input_size'][0]} channels")
    names = config.get("label_names", values.get("label_names"))
    if names is not None:
        if not isinstance(names, list) or len(names) != classes or not all(map(_is_printable, names)):
            raise ValueError(f"{path}: label_names must hold {classes} printable names, got {short(names)}")
        known["label_names"] = names
    return known | {"num_classes": classes, "architecture": config["architecture"]}


def _is_printable(value: Any) -> bool:
    """Whether it is a text without characters that could control a terminal."""
    return isinstance(value, str) and value.isprintable()


def _check_arguments(values: dict[str, Any], where: str) -> None:
    """Refuse anything but plain values, and numbers that keep timm's own code busy before it has made a tensor: depths
    and widths are lengths of its lists and loops. Any value counts as one at least."""
    steps: float = 0
    for key, value in values.items():
        for item in _flatten(value, where):
            if isinstance(item, str) and any(mark in item for mark in "/\\:"):
                raise ValueError(f"{where}: {short(key)} must be a plain word, got {short(item)}")
            steps += max(1, abs(item)) if isinstance(item, (int, float)) else 1
            if steps > MAX_STEPS:
                raise ValueError(
                    f"{where}: numbers must add up to at most {MAX_STEPS}, exceeded with {short(item)} for {short(key)}"
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
    check_present(path)
    expected = module.state_dict()
    try:
        with path.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > MAX_JSON_BYTES:
            raise ValueError(f"a header of {header} bytes")
        with safe_open(path, "pt") as file:  # which compares the header with the size of the file
            names = set(file.keys())
            found = {key: file.get_slice(key) for key in sorted(names & expected.keys())}
            kinds = {key: (tuple(part.get_shape()), DTYPES.get(part.get_dtype())) for key, part in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({short(str(error))}); fetch or save it again"
        ) from error
    missing, foreign = sorted(expected.keys() - names), sorted(names - expected.keys())
    if missing or foreign:
        raise ValueError(
            f"{path} does not hold this model's tensors: {len(missing)} missing {missing[:3]},"
            f" {len(foreign)} foreign {short(foreign[:3])}"
        )
    for key, (shape, dtype) in kinds.items():
        if shape != expected[key].shape:
            raise ValueError(f"{path}: {key} has shape {shape}, expected {tuple(expected[key].shape)}")
        is_float = dtype is not None and "float" in dtype
        if dtype is None or is_float != expected[key].is_floating_point():
            kind = dtype or "numbers of an unknown kind"
            raise ValueError(f"{path}: {key} holds {kind}, expected {expected[key].dtype}")


def check_present(path: Path) -> None:
    """Raise FileNotFoundError where a file of a saved model is missing."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, so the folder is not a complete saved model; save or download it again"
        )


def check_memory(path: Path, module: nn.Module) -> None:
    """Refuse a module, which may be on the meta device, that takes far more memory than the file of its weights.

    Buffers that are not saved may do so: those of a Swin grow with the image size, its weights do not.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the module is too large.
    """
    check_present(path)
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    most = 4 * path.stat().st_size + MAX_SPARE  # half precision doubles when it is loaded
    if size > most:
        raise ValueError(f"{path}: this network takes {size} bytes, more than the {most} for a file of this size")


def short(value: Any) -> str:
    """A value from outside for an error: at most 80 characters, none that could steer a terminal."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
