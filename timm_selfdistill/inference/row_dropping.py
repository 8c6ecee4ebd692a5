"""Rows of a batch leave a network in the middle: how each stage's output is read, and where that is exact.

A forward hook on the module that ends a stage may return fewer rows than it got, and the layers behind run on those
that are left. Whether their logits stay the same depends on the network, so a `Route` is found by trying.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.hooks import RemovableHandle

from ..cost import evaluating
from ..model import SelfDistillModel
from ..timm_model import TimmModel

_running = threading.local()
"""`.call` is what the hooks of this thread call."""


class StageHook:
    """A forward hook that hands a module's output to the call that its thread is in, if any."""

    def __init__(self, exit: int, owner: int):
        self.exit, self.owner = exit, owner

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        owner, call = getattr(_running, "call", (None, None))
        return call(self.exit, output) if call is not None and owner == self.owner else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _do_nothing  # a copy of the network has nobody to hand anything to

    def __reduce__(self) -> tuple[Any, ...]:
        return _find_nothing, ()


def add_hook(module: nn.Module, hook: StageHook) -> RemovableHandle:
    """Put a hook on a module, in place of those that came with a copy of it."""
    for key in [key for key, found in module._forward_hooks.items() if found is _do_nothing]:
        del module._forward_hooks[key]
    return module.register_forward_hook(hook)


def _do_nothing(*_: Any) -> None:
    pass


def _find_nothing() -> Callable[..., None]:
    return _do_nothing


class AllGone(Exception):
    """No image is left, so the rest of the network need not run."""


def run_with(owner: int, call: Callable[[int, Any], Any], network: Callable[[Tensor], Any], x: Tensor) -> Any:
    """The output of a network in which `call(exit, output)` may replace the output of each stage, by returning other
    than None; None where it raised `AllGone`."""
    before = getattr(_running, "call", (None, None))
    _running.call = owner, call
    try:
        return network(x)
    except AllGone:
        return None
    finally:
        _running.call = before


@dataclass(frozen=True)
class MapReader:
    """From a module's output to the feature map (B, C, H, W) that is in it."""

    index: int
    """Which of the output's parts it is."""
    layout: Literal["NCHW", "NHWC", "tokens"]
    """"tokens": (B, N, C), with class and register tokens in front."""
    height: int
    width: int
    copy: bool = False
    """Where the head would write into the output."""

    def __call__(self, output: Any) -> Tensor:
        part = tree_leaves(output)[self.index]
        if self.layout == "tokens":
            part = part[:, part.shape[1] - self.height * self.width :].unflatten(1, (self.height, self.width))
        feature_map = part if self.layout == "NCHW" else part.permute(0, 3, 1, 2)
        return feature_map.clone() if self.copy else feature_map


class Route(NamedTuple):
    """How a batch goes through a network for images of one size."""

    readers: list[MapReader]
    """For each shallow exit."""
    droppable: list[bool]
    """For each shallow exit: whether rows may leave there."""


def find_route(model: SelfDistillModel, owner: int, size: tuple[int, ...]) -> Route | None:
    """Try how images of one size go through a model whose stages have `StageHook`s; None where stages cannot be read.

    Args:
        size: (in_chans, H, W).
    """
    exits, like = len(model.stages), next(p for p in model.parameters() if p.is_floating_point())
    outputs: list[tuple[int, Any]] = []

    def keep_output(exit: int, output: Any) -> None:
        outputs.append((exit, tree_map_only(Tensor, torch.clone, output)))

    without_autocast = torch.autocast(like.device.type, enabled=False)
    # only ordinary tensors, not those of inference mode, tell what was written into them
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), without_autocast:
        x = torch.randn(exits + 2, *size, generator=torch.Generator().manual_seed(0))
        x = (x * torch.linspace(0.2, 2, exits + 2)[:, None, None, None]).to(like)  # no two rows are alike
        run_with(owner, keep_output, model.backbone, x)
        if [exit for exit, _ in outputs] != list(range(exits)):
            return None  # not all stages are modules, or one runs twice
        maps = model.backbone.forward_intermediates(
            x, indices=[stage.index for stage in model.stages], intermediates_only=True
        )
        readers = []
        for head, (_, output), feature_map in zip(model.heads, outputs, maps):
            reader = _find_reader(output, feature_map)
            if reader is None:
                return None
            if _writes_into(head, feature_map):  # the layers behind would see that
                reader = replace(reader, copy=True)
            readers.append(reader)
        expected = _features_and_logits(model.backbone, x)
        droppable = [_is_exact(model, owner, x, expected, [exit]) for exit in range(exits)]
        if not _is_exact(model, owner, x, expected, [exit for exit in range(exits) if droppable[exit]]):
            droppable = [False] * exits
    return Route(readers, droppable)


def _writes_into(head: nn.Module, feature_map: Tensor) -> bool:
    if feature_map.is_inference():  # of a network that was made in inference mode
        return True
    version = feature_map._version
    head(feature_map)
    return feature_map._version != version


def _features_and_logits(backbone: TimmModel, x: Tensor) -> list[Tensor]:
    """Both, since a fresh classifier may give every image the same logits."""
    features = backbone.forward_features(x)
    return [*tree_leaves(features), backbone.forward_head(features)]


def _is_exact(model: SelfDistillModel, owner: int, x: Tensor, expected: list[Tensor], exits: list[int]) -> bool:
    """Whether the rest keep their features and logits when the first row leaves at each of these exits."""

    def drop_first(exit: int, output: Any) -> Any:
        if exit not in exits:
            return None
        rows = tree_leaves(output)[0].shape[0]
        return keep_rows(output, torch.arange(1, rows, device=x.device), rows)

    try:
        found = run_with(owner, drop_first, partial(_features_and_logits, model.backbone), x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False  # the network remembers how many rows there were
    wanted = [part[len(exits) :] if _has_rows(part, len(x)) else part for part in expected]
    return len(found) == len(wanted) and all(map(_same, found, wanted))


def _same(first: Tensor, second: Tensor) -> bool:
    """But for rounding, which depends on the size of a batch."""
    if first.shape != second.shape or not first.is_floating_point():
        return torch.equal(first, second)
    tolerance = max(1e-2 if first.is_cuda else 1e-4, 4 * torch.finfo(first.dtype).eps)
    return bool((first - second).abs().max() <= tolerance * second.abs().max())


def keep_rows(output: Any, rows: Tensor, batch: int) -> Any:
    """Some rows of every tensor in a module's output that has `batch` of them."""

    def select(part: Any) -> Any:
        if not _has_rows(part, batch):
            return part
        if part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last):
            return part.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
        return part.index_select(0, rows)

    return tree_map(select, output)


def _has_rows(part: Any, batch: int) -> bool:
    return isinstance(part, Tensor) and part.ndim > 1 and part.shape[0] == batch


def _find_reader(output: Any, feature_map: Tensor) -> MapReader | None:
    """How a feature map (B, C, H, W) is read from a module's output; None where it is not in there."""
    height, width = feature_map.shape[2:]
    for index, part in enumerate(tree_leaves(output)):
        if not _has_rows(part, len(feature_map)):
            continue
        readers = []
        if part.ndim == 4:
            readers = [MapReader(index, "NCHW", height, width), MapReader(index, "NHWC", height, width)]
        elif part.ndim == 3 and part.shape[1] >= height * width:
            readers = [MapReader(index, "tokens", height, width)]
        for reader in readers:
            found = reader(output)
            if found.shape == feature_map.shape and _same(found, feature_map):
                return reader
    return None
