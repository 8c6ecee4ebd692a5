"""The weights that a run begins with."""
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from .saved_weights import read_weights

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
SHOWN = 3
"""Tensors that an error names."""


def load_checkpoint(model: nn.Module, path: str | Path, new_classifier: bool = False) -> None:
    """Load the backbone's weights of a checkpoint or a saved model, see `read_weights`: every tensor.

    The model gets the preprocessing of the saved one, too, where it is known, but for the image size; and its class
    names, where its classifier is loaded.

    Args:
        new_classifier: leave the model's own as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is of another network.
    """
    saved = read_weights(path)
    state = dict(saved.backbone)
    if new_classifier:
        own = model.state_dict()
        state |= {name: own[name] for name in _classifier_names(model) if name in own}
    check_fits(model, state, path)
    model.load_state_dict(state)
    known = saved.config.get("pretrained_cfg", {})
    model.pretrained_cfg.update({key: known[key] for key in PREPROCESSING if key in known})
    if not new_classifier:
        names = saved.config.get("label_names")
        model.pretrained_cfg.update(num_classes=model.num_classes, **({"label_names": names} if names else {}))


def init_classifier(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Scale the initial weights and bias of a timm model's classifier, and set its bias; None leaves them as they are.

    Raises:
        ValueError: the classifier is no layer with a weight and a bias.
    """
    if scale is None and bias is None:
        return
    layer = model.get_classifier()
    if not isinstance(getattr(layer, "bias", None), Tensor):
        raise ValueError(f"head_init_scale and head_init_bias are for a classifier with a bias, and"
                         f" {type(model).__name__} has {type(layer).__name__}")
    with torch.no_grad():
        if scale is not None:
            layer.weight.mul_(scale)
            layer.bias.mul_(scale)
        if bias is not None:
            layer.bias.fill_(bias)


def check_task(task: Any) -> None:
    """Raise unless this can be trained.

    Raises:
        TypeError: it is no TrainingTask.
        ValueError: its weights hold NaN or infinity.
    """
    if not isinstance(task, TrainingTask):
        raise TypeError(f"expected a timm.task.TrainingTask such as SelfDistillTask, got {type(task).__name__}")
    spoilt = [name for name, value in task.get_trainable_module().state_dict().items()
              if value.is_floating_point() and not bool(value.isfinite().all())]
    if spoilt:
        raise ValueError(f"the model's weights are not finite before the first update: {_shorten(spoilt)}; they come"
                         " from a run that diverged or a damaged file, take others")


def check_fits(model: nn.Module, saved: dict[str, Tensor], path: str | Path) -> None:
    """Raise ValueError where weights have other names or shapes than those of a timm model."""
    own = model.state_dict()
    differing = [f"{name} {tuple(saved[name].shape)} instead of {tuple(value.shape)}"
                 for name, value in own.items() if name in saved and saved[name].shape != value.shape]
    problems = [*differing, *(f"{name} is missing" for name in own if name not in saved),
                *(f"{name} is unknown" for name in saved if name not in own)]
    if not problems:
        return
    names = _classifier_names(model)
    found = next((saved[name].shape[0] for name in names if name in saved), None)
    if len(problems) == len(differing) and {text.split()[0] for text in differing} <= set(names):
        advice = (f"it was made for {found} classes, not {model.num_classes}: --num-classes {found} keeps its"
                  " classifier, --pretrained-path instead of --initial-checkpoint begins with a new one")
    else:
        advice = "give the --model, --in-chans and --num-classes that it was made with"
    raise ValueError(f"{path} does not fit {type(model).__name__}: {_shorten(problems)}; {advice}")


def _classifier_names(model: nn.Module) -> list[str]:
    classifier = model.pretrained_cfg.get("classifier") or ()
    return [f"{name}.{part}" for name in ([classifier] if isinstance(classifier, str) else classifier)
            for part in ("weight", "bias")]


def _shorten(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
