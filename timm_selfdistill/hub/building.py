"""Making the network that a config.json describes, quickly and within limits."""

from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from ..heads import HeadFactory
from .files import ExitSettings
from .trust import preprocessing

MAX_CALLS = 64_000
"""Most calls of torch while a network is made; timm's largest takes 32,000."""
MAX_ELEMENTS = 2**28
"""Most elements of a tensor."""
MAX_BUFFER_BYTES = 256 * 2**20
"""Most bytes of buffers that no file holds; timm's largest takes 200 MB."""


class NoRandomInit(TorchFunctionMode):
    """Within it random first values are not drawn, which takes most of the time of making a network.

    For networks whose parameters are all loaded afterwards.
    """

    SKIPPED = frozenset(
        {
            Tensor.normal_,
            Tensor.uniform_,
            init.normal_,
            init.uniform_,
            init.trunc_normal_,
            init.kaiming_normal_,
            init.kaiming_uniform_,
            init.xavier_normal_,
            init.xavier_uniform_,
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class BoundedBuild(TorchFunctionMode):
    """Within it a network beyond the limits is given up; for the meta device, on which it takes no memory till then."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise ValueError(f"it has too many layers: making it takes more than {MAX_CALLS} calls of torch")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > MAX_ELEMENTS:
            raise ValueError(f"it has a tensor of {result.numel()} elements, more than {MAX_ELEMENTS}")
        return result


def build_backbone(config: dict[str, Any], folder: str | PathLike) -> nn.Module:
    """The timm model that a config of `read_config` describes, with fresh weights.

    Raises:
        ValueError: timm makes no network of it.
    """
    path = Path(folder) / "config.json"
    try:
        return timm.create_model(
            config["architecture"], pretrained_cfg=preprocessing(config, path), **(config.get("model_args") or {})
        )
    except Exception as error:  # whatever timm's code does with arguments that it was not written for
        reason = shorten(repr(error), 200)
        raise ValueError(f"{path}: timm does not make a network of its model_args: {reason}") from error


def choose_head(settings: ExitSettings, head: HeadFactory | None, name: str | PathLike) -> str | HeadFactory:
    """What makes the heads of a saved model.

    Args:
        settings: "self_distill" of its config.
        head: the callable that it was wrapped with, if it was one.

    Raises:
        ValueError: it was one, which is not given.
    """
    kind = head or settings["head"]
    if kind is None:
        raise ValueError(f"{name} was saved with a head of its own; pass it: from_pretrained(..., head=...)")
    return kind


def check_buffers(model: nn.Module) -> None:
    """Refuse a network, which may be on the meta device, with too large buffers that are not in its files.

    Raises:
        ValueError: it has.
    """
    saved = model.state_dict().keys()
    size = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in saved)
    if size > MAX_BUFFER_BYTES:
        raise ValueError(f"this network needs {size} bytes beside its weights, more than {MAX_BUFFER_BYTES}")
