"""The preprocessing that a model was made for, and what a run changes of it."""
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import nn

from ..cost import default_input_size
from ..model import SelfDistillModel
from .initial_weights import load_checkpoint


def takes_other_sizes(backbone: nn.Module) -> bool:
    """Whether a timm model can be moved to another image size than the one it was created with."""
    return not backbone.pretrained_cfg.get("fixed_input_size") or hasattr(backbone, "set_input_size")


def create_backbone(
        name: str, img_size: int | None = None, initial_checkpoint: str | None = None,
        pretrained_path: str | None = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with `img_size` pixels from the beginning where the model can only be made for them.

    Args:
        initial_checkpoint: checkpoint or saved model whose tensors to load, all of them; see `load_checkpoint`.
        pretrained_path: likewise, but with a new classifier.
        kwargs: further arguments of `timm.create_model`.
    """
    if initial_checkpoint and pretrained_path:
        raise ValueError("initial_checkpoint and pretrained_path are two ways to load a checkpoint; give one of them")
    model = _create(name, img_size, **kwargs)
    if initial_checkpoint:
        load_checkpoint(model, initial_checkpoint)
    elif pretrained_path:
        load_checkpoint(model, pretrained_path, new_classifier=True)
    return model


def own_class_names(backbone: nn.Module) -> list[str] | None:
    """Those that came with a timm model's weights; None where there are none, or its classifier is for other ones."""
    names = backbone.pretrained_cfg.get("label_names")
    return list(names) if names and len(names) == backbone.num_classes else None


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
        in_chans: int | None = None,
        class_names: list[str] | None = None,
        **overrides: Any,
) -> dict[str, Any]:
    """The preprocessing of a timm model, with what a run changes of it.

    It is written back to `backbone.pretrained_cfg`, with the class names, so that
    `timm.data.resolve_model_data_config(backbone)` gives the same, also after saving and loading. A model that takes
    one image size only is moved to `img_size` by its own `set_input_size`.

    Args:
        img_size: pixels; None is the model's own size.
        in_chans: channels; None are the model's own.
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
    in_chans = default_input_size(backbone)[0] if in_chans is None else in_chans
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
    if img_size is not None and isinstance(backbone, SelfDistillModel):
        backbone.set_input_size(img_size=size)
    if class_names is not None:
        backbone.pretrained_cfg.update(label_names=list(class_names), num_classes=len(class_names))
    return config
