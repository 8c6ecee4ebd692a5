"""The preprocessing that a model was made for, and what a run changes of it."""
import warnings
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import nn

from .initial_weights import load_initial_checkpoint


def takes_other_sizes(backbone: nn.Module) -> bool:
    """Whether a timm model can be moved to another image size than the one it was created with."""
    return not backbone.pretrained_cfg.get("fixed_input_size") or hasattr(backbone, "set_input_size")


def create_backbone(
        name: str, img_size: int | None = None, initial_checkpoint: str | None = None,
        pretrained_path: str | None = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with `img_size` pixels from the beginning where the model can only be made for them.

    Args:
        initial_checkpoint: whose weights to load, all of them; see `load_initial_checkpoint`.
        pretrained_path: a checkpoint in the place of the model's pretrained weights; where num_classes is given, its
            classifier is left out.
        kwargs: further arguments of `timm.create_model`.
    """
    if pretrained_path:
        if not Path(pretrained_path).is_file():
            raise FileNotFoundError(f"pretrained_path {pretrained_path} is no file; expected .safetensors or .pth")
        overlay = {"file": pretrained_path, **({"num_classes": -1} if kwargs.get("num_classes") else {})}
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = _create(name, img_size, **kwargs)
    if initial_checkpoint:
        load_initial_checkpoint(model, initial_checkpoint)
    return model


def warn_new_classifier(backbone: nn.Module) -> None:
    """Warn where pretrained weights for another number of classes left a backbone, which is to be frozen, a random
    classifier. Before `model_data_config`, which writes the new number down."""
    if backbone.pretrained_cfg["num_classes"] != backbone.num_classes:
        warnings.warn(
            f"the frozen backbone's classifier for {backbone.num_classes} classes is new, with random weights, and has"
            " nothing to teach the exits; fine-tune the network first", stacklevel=2)


def _create(name: str, img_size: int | None, **kwargs: Any) -> nn.Module:
    model = timm.create_model(name, **kwargs)
    channels, *size = model.pretrained_cfg["input_size"]
    if img_size is None or size == [img_size, img_size] or takes_other_sizes(model):
        return model
    try:
        model = timm.create_model(name, img_size=img_size, **kwargs)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return model  # `model_data_config` says that it takes no other size
    model.pretrained_cfg["input_size"] = (channels, img_size, img_size)
    return model


def model_data_config(
        backbone: nn.Module,
        img_size: int | None = None,
        in_chans: int = 3,
        class_names: list[str] | None = None,
        **overrides: Any,
) -> dict[str, Any]:
    """The preprocessing of a timm model, with what a run changes of it.

    It is written back to `backbone.pretrained_cfg`, with the class names, so that
    `timm.data.resolve_model_data_config(backbone)` gives the same, also after saving and loading. A model that takes
    one image size only is moved to `img_size` by its own `set_input_size`.

    Args:
        img_size: pixels; None is the model's own size.
        overrides: mean, std, interpolation, crop_pct; None values are the model's own.

    Raises:
        ValueError: the model takes no other image size than its own, or a value does not fit.
    """
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size must be at least 1 pixel, got {img_size}")
    if overrides.get("crop_pct") is not None and not 0 < overrides["crop_pct"] <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], got {overrides['crop_pct']}")
    config = resolve_model_data_config(backbone)
    size = (img_size, img_size) if img_size else tuple(config["input_size"][1:])
    if size != tuple(config["input_size"][1:]) and backbone.pretrained_cfg.get("fixed_input_size"):
        if not takes_other_sizes(backbone):
            raise ValueError(
                f"{type(backbone).__name__} takes images of {config['input_size'][1:]} pixels only, not {size}")
        backbone.set_input_size(img_size=size)
    config["input_size"] = (in_chans, *size)
    config.update({key: value for key, value in overrides.items() if value is not None})
    for key in ("mean", "std"):
        values = tuple(config[key])
        if overrides.get(key) is not None and len(values) not in (1, in_chans):
            raise ValueError(f"{key} has {len(values)} values for images of {in_chans} channels: {values}")
        if len(values) != in_chans:
            config[key] = (sum(values) / len(values),) * in_chans
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    backbone.pretrained_cfg.update({key: config[key] for key in kept if key in config}, test_input_size=None)
    if class_names is not None:
        backbone.pretrained_cfg.update(label_names=list(class_names), num_classes=len(class_names))
    return config
