"""Checkpoints: written beside and renamed, the newest kept."""
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..hub import unshared_state_dict

MODEL_FILE = "model.safetensors"


def keep_unwrapped_weights(accelerator: Accelerator) -> None:
    """Let checkpoints hold the weights under the model's own names, whatever wraps it (DDP, torch.compile)."""

    def on_save(models: list[nn.Module], weights: list[dict], output_dir: str) -> None:
        for index, model in enumerate(models):
            weights[index] = unshared_state_dict(plain(accelerator, model))

    def on_load(models: list[nn.Module], input_dir: str) -> None:
        for model in models:
            _load(plain(accelerator, model), Path(input_dir) / MODEL_FILE)
        models.clear()

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)


def plain(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The module under DDP and mixed-precision wrappers."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> Path:
    """Save the state of the run after `step` updates, and remove all but the newest `keep` checkpoints."""
    final, fresh = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    if not final.exists():
        if accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(fresh))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            os.replace(fresh, final)
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def set_newer_aside(checkpoint: Path, folder: Path) -> None:
    """Rename the checkpoints that follow the resumed one: they belong to a history that this run leaves."""
    for path in list_checkpoints(folder):
        if path.name > checkpoint.name:
            shutil.rmtree(path.with_name(f"left-{path.name}"), ignore_errors=True)
            os.replace(path, path.with_name(f"left-{path.name}"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def find_checkpoint(resume: str, output: str) -> Path:
    """The checkpoint that `resume` means: "latest" in `output`, a run directory, or a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    if resume == "latest" and not output:
        raise FileNotFoundError("resume='latest' needs the run directory as output; or give resume its path")
    path = Path(output if resume == "latest" else resume)
    if (path / MODEL_FILE).is_file():
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise FileNotFoundError(f"nothing to resume: {path} is no checkpoint and holds none under checkpoints/")
    return checkpoints[-1]


def _load(model: nn.Module, path: Path) -> None:
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint") from error
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    differing = sorted(
        key for key in shapes.keys() | saved.keys()
        if key not in saved or key not in shapes or tuple(saved[key].shape) != shapes[key]
    )
    if differing:
        raise ValueError(
            f"{path} is the checkpoint of another model: {len(differing)} tensors differ, {differing[0]!r} first;"
            " resume with the model, exits, head, number of classes and model_ema that it was made with"
        )
    model.load_state_dict(saved)
