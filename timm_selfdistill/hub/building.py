"""Building the network that a config.json describes: quickly, and first where it takes no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from ..heads import HeadFactory
from .files import BACKBONE, ExitSettings, read_network
from .trust import MAX_SPARE, MAX_STEPS, check_memory, preprocessing


class NoRandomInit(TorchFunctionMode):
    """Skips random initialization, which takes most of the time of building a network.

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
    """Stops building a network that would never be done, or has a tensor that is too large whatever the files hold."""

    calls = 0
    index_bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.calls += 1
        if self.calls > MAX_STEPS:
            raise ValueError(f"it has too many layers: making it takes more than {MAX_STEPS} calls of torch")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > MAX_SPARE:
            raise ValueError(f"it has a tensor of {result.numel()} elements, more than {MAX_SPARE}")
        if func is torch.empty and not result.is_floating_point():  # which TinyViT fills in a loop of Python
            self.index_bytes += result.nbytes
            if self.index_bytes > MAX_SPARE:
                raise ValueError(f"it has tables of indices of more than {MAX_SPARE} bytes")
        return result


@contextmanager
def sketching() -> Iterator[None]:
    """Networks are built on the meta device, where they take no memory.

    Raises:
        ValueError: building takes too long, or a tensor is too large.
    """
    with torch.device("meta"), BoundedBuild(), NoRandomInit():
        yield


def check_plain_network(folder: Path) -> None:
    """Raise ValueError for the folder of a plain timm model that takes far more memory than its file of weights; those
    of self-distilled models are compared with their tensors, see `check_model_files`."""
    config = read_network(folder)
    if "self_distill" not in config:
        with sketching():
            network = build_backbone(config, folder)
        check_memory(folder / BACKBONE, network)


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
