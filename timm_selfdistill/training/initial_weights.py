"""The weights that a run begins with."""
import pickle
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.task import TrainingTask
from torch import Tensor, nn

UNREADABLE = (SafetensorError, pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError, TypeError,
              LookupError, AttributeError)
"""What timm and torch raise at files that are no checkpoint."""
SHOWN = 3
"""Tensors that an error names."""


def load_checkpoint(model: nn.Module, path: str | Path, new_classifier: bool = False) -> None:
    """Load a checkpoint of timm's, .safetensors or what torch.load reads with weights_only: every tensor, the moving
    average where there is one.

    Args:
        new_classifier: leave the model's own as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} is no file; expected .safetensors or .pth")
    try:
        saved = load_state_dict(str(path))
    except UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the checkpoint {path} ({reason}); expected .safetensors, or weights alone as"
                         " torch.load(..., weights_only=True) reads them") from error
    if not saved or not all(isinstance(value, Tensor) for value in saved.values()):
        raise ValueError(f"{path} holds no state dict: names and tensors")
    if new_classifier:
        own = model.state_dict()
        saved |= {name: own[name] for name in _classifier_names(model) if name in own}
    _check_fits(model, saved, path)
    model.load_state_dict(saved)


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


def _check_fits(model: nn.Module, saved: dict[str, Tensor], path: str | Path) -> None:
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
