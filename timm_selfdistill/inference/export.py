"""Networks for other runtimes: torch.export and ONNX, any exit alone, or a file for each stage."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import TypedDict

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..cost import default_input_size, evaluating
from ..model import SelfDistillModel
from .staging import split_stages


class StageFile(TypedDict):
    """An entry of stages.json."""

    file: str
    inputs: list[str]
    outputs: list[str]


TOLERANCE = 1e-4
"""Of logits, as a share of the largest; onnxruntime against torch."""
STAGES_FILE = "stages.json"


def export_program(network: nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    """`torch.export` of a network from images (B, C, H, W) to logits, in eval mode, with a batch of any size.

    Args:
        network: e.g. `model.truncate(exit)`, or `model.strip()`.
        input_size: (channels, height, width) in pixels.

    Examples:
        >>> import timm
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.inference.export import export_program
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> program = export_program(model.truncate(0), (3, 64, 64))
    """
    like = next(p for p in network.parameters() if p.is_floating_point())
    x = torch.zeros(2, *input_size, device=like.device, dtype=like.dtype)
    with evaluating(network), torch.no_grad():
        return torch.export.export(network, (x,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)


def export_onnx(
    model: nn.Module,
    path: str | PathLike,
    exit: int | str = -1,
    input_size: tuple[int, int, int] | None = None,
) -> None:
    """Write one exit as an ONNX file, after seeing that onnxruntime gives the same logits.

    Input "images" (batch, C, H, W), float32 as the model's transform makes them, output "logits" (batch, K).

    Args:
        model: self-distilled, or a network with one exit: a truncated model, or a plain timm model.
        exit: as of `SelfDistillModel.predict`; -1 is the plain network.
        input_size: (channels, height, width) in pixels; None is the model's own, `input_size`.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: there is no such exit, or onnxruntime gives other logits.

    Examples:
        >>> import timm
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.inference.export import export_onnx
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> export_onnx(model, "exit0.onnx", exit=0, input_size=(3, 64, 64))
    """
    check_onnx()
    if not isinstance(model, SelfDistillModel) and exit != -1:
        raise ValueError(f"this {type(model).__name__} has one exit only, got exit {exit!r}; leave it out")
    network = model.truncate(exit) if isinstance(model, SelfDistillModel) else deepcopy(model)
    network = network.cpu().float().eval()
    input_size = input_size or getattr(model, "input_size", None) or default_input_size(model)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    x = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _write_onnx(export_program(network, input_size), Path(path), ["images"], ["logits"], [x], [network(x)])


def export_stages(
    model: SelfDistillModel,
    folder: str | PathLike,
    input_size: tuple[int, int, int] | None = None,
    value_ranges: Mapping[str, tuple[float, float]] | None = None,
) -> list[Path]:
    """Write one ONNX file for each stage with its classifier, so that a runtime without torch can exit early.

    stage0.onnx takes "images"; every stage gives "logits" (batch, K), and all but the last what goes on, the inputs of
    the next, whose rows are the images. stages.json lists names, and what else a runtime needs: policy, thresholds
    (null where nobody leaves, and so everywhere in a model that is not calibrated), temperatures, preprocessing and
    class names.

    Args:
        input_size: (channels, height, width) in pixels; None is the model's own, `input_size`.
        value_ranges: black and white of images with more than 8 bits, integers ("I") and floating-point numbers ("F"),
            for stages.json; without them a runtime takes the full range.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: the network cannot be cut there, or onnxruntime gives other logits.

    Examples:
        >>> import timm
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.inference.export import export_stages
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> [path.name for path in export_stages(model, "stages", input_size=(3, 64, 64))]
        ['stage0.onnx', 'stage1.onnx', 'stage2.onnx', 'stage3.onnx']
    """
    check_onnx()
    model_copy = model.truncate("ensemble").model.cpu().float().eval()
    input_size = input_size or model.input_size
    program = export_program(_AllLogits(model_copy), input_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    x = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    carried, names_in = [x], ["images"]
    stages: list[StageFile] = []
    paths: list[Path] = []
    for index, stage in enumerate(split_stages(program)):
        with torch.no_grad():
            outputs = stage(*carried)
        names_out = ["logits", *(f"state{index}_{number}" for number in range(len(outputs) - 1))]
        paths.append(folder / f"stage{index}.onnx")
        shapes = tuple({0: Dim("batch", min=1)} for _ in carried)
        exported = torch.export.export(stage, tuple(carried), dynamic_shapes=shapes, strict=False)
        _write_onnx(exported, paths[-1], names_in, names_out, carried, outputs)
        stages.append({"file": paths[-1].name, "inputs": names_in, "outputs": names_out})
        carried, names_in = list(outputs[1:]), names_out[1:]
    _write_description(model, folder, stages, input_size, value_ranges)
    return paths


def check_onnx() -> None:
    """Raise ImportError unless all packages of the extra are there."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {', '.join(missing)}: pip install 'timm-selfdistill[onnx]'")


class _AllLogits(nn.Module):
    """The logits of every exit."""

    def __init__(self, model: SelfDistillModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.model.forward_exits(x, with_features=False).logits


def _write_onnx(
    program: ExportedProgram,
    path: Path,
    inputs: list[str],
    outputs: list[str],
    x: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> None:
    """Write a file whose answers to inputs x are the expected ones; another one is not left behind."""
    onnx_program = torch.onnx.export(
        program, dynamo=True, input_names=inputs, output_names=outputs, external_data=False, verbose=False
    )
    assert onnx_program is not None  # which is for the former exporter, dynamo=False
    fresh = path.with_name(f".{path.name}.new")
    try:
        onnx_program.save(str(fresh))
        _compare(fresh, path, x, expected)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _compare(fresh: Path, path: Path, inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(fresh), providers=["CPUExecutionProvider"])
    feeds = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
    for found, wanted in zip(session.run(None, feeds), expected, strict=True):
        difference = float((torch.from_numpy(found) - wanted).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise ValueError(f"{path}: onnxruntime's answers differ by {difference:.2g} from torch's")


def _write_description(
    model: SelfDistillModel,
    folder: Path,
    stages: list[StageFile],
    input_size: tuple[int, int, int],
    value_ranges: Mapping[str, tuple[float, float]] | None,
) -> None:
    config = resolve_model_data_config(model.backbone)
    calibrated = model.early_exit or {}
    description = {
        "stages": stages,
        "policy": calibrated.get("policy", "confidence"),
        "thresholds": calibrated.get("thresholds", [None] * len(model.stages)),
        "temperatures": calibrated.get("temperatures", [1.0] * len(model.exits)),
        "input_size": list(input_size),
        **{key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        "value_ranges": {kind: list(value_range) for kind, value_range in (value_ranges or {}).items()},
        "class_names": model.backbone.pretrained_cfg.get("label_names"),
    }
    (folder / STAGES_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
