"""What an exit costs: parameters and multiply-adds, counted on the meta device, and time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from statistics import median
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def default_input_size(model: nn.Module, model_args: dict[str, Any] | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a timm model was made for.

    Args:
        model_args: what `create_model` was given; not every model remembers its `img_size`.
    """
    own_size = (model_args or {}).get("img_size") or getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = to_2tuple(own_size or resolve_model_data_config(model)["input_size"][-2:])
    first_weight = next((p for p in model.parameters() if p.ndim == 4), None)
    channels = getattr(model, "in_chans", None) or (3 if first_weight is None else first_weight.shape[1])
    return channels, height, width


class Cost(NamedTuple):
    params: int
    """Parameters that took part."""
    macs: int
    """Multiply-adds for one image."""
    output: Any
    """What the call returned: shapes, mostly on the meta device without values."""


def count_cost(
    model: nn.Module,
    input_size: tuple[int, int, int],
    call: Callable[[Any, Tensor], Any] = nn.Module.__call__,
) -> Cost:
    """Parameters used and multiply-adds of `call(model, x)` in eval mode, for one image.

    Runs a copy on the meta device: no memory, no arithmetic, no random numbers, and no trace on the model. Models that
    look at values, or cannot be copied, run on their own device. Multiply-adds are half of what torch's
    `FlopCounterMode` counts.

    Args:
        input_size: (channels, height, width) in pixels.
    """
    return CostCounter(model).count(input_size, call)


class CostCounter:
    """`count_cost` for several calls of one model, which is copied once."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.copied: nn.Module | None = None
        with suppress(Exception):  # whatever an object raises that cannot be copied: a lock, say
            self.copied = _copy_to_meta(model).eval()

    def count(self, input_size: tuple[int, int, int], call: Callable[[Any, Tensor], Any]) -> Cost:
        if self.copied is not None:
            try:
                return _run_counted(self.copied, torch.device("meta"), input_size, call)
            except (RuntimeError, TypeError) as error:
                if "meta" not in str(error):
                    raise
        with evaluating(self.model):
            return _run_counted(self.model, next(self.model.parameters()).device, input_size, call)


def _copy_to_meta(model: nn.Module) -> Any:
    """A copy whose tensors have no values; tensors and modules that are shared are shared in the copy, too.

    Under torch's `FakeTensorMode`, tensors keep their device, and FLOPs of the operations that are fused there, such as
    an LSTM's on a CPU, would not be counted.
    """
    copies: dict[int, Any] = {}  # the memo of deepcopy: by the id of a tensor, what takes its place
    for module in model.modules():
        for tensor in tree_leaves(vars(module)):
            if isinstance(tensor, Tensor):
                copy = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
    return deepcopy(model, copies)


def _run_counted(
    model: nn.Module, device: torch.device, input_size: tuple[int, int, int], call: Callable[[Any, Tensor], Any]
) -> Cost:
    params = list(model.parameters())
    dtype = next((p.dtype for p in params if p.is_floating_point()), torch.float32)
    x = torch.zeros(1, *input_size, device=device, dtype=dtype)
    seen = _SeenTensors()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the other kernels are not counted
        with FlopCounterMode(display=False) as flops, seen:
            output = call(model, x)
    used = sum(p.numel() for p in params if id(p) in seen.ids)
    return Cost(used, flops.get_total_flops() // 2, output)


class _SeenTensors(TorchDispatchMode):
    """Remembers which tensors any operation took, and so which parameters a forward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ids.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def measure_speedups(
    model: nn.Module,
    reference: Callable[[Tensor], Any],
    calls: list[Callable[[Tensor], Any]],
    x: Tensor,
    rounds: int = 15,
    seconds: float = 5.0,
) -> list[float]:
    """Time of `reference(x)` over the time of each call, in eval mode: medians of `time_ratios`."""
    return [median(ratios) for ratios in time_ratios(model, reference, calls, x, rounds, seconds)]


def time_ratios(
    model: nn.Module,
    reference: Callable[[Tensor], Any],
    calls: list[Callable[[Tensor], Any]],
    x: Tensor,
    rounds: int = 15,
    seconds: float = 5.0,
    at_least: int = 1,
) -> list[list[float]]:
    """Time of `reference(x)` over the time of each call, in eval mode: for each call the ratios of all rounds. In each
    round all calls run in turn.

    Args:
        x: a batch of images (B, C, H, W), on the model's device.
        rounds: at most; fewer, down to `at_least`, where `seconds` are used up.
    """
    times: list[list[float]] = [[] for _ in [reference, *calls]]
    began = time.perf_counter()
    with evaluating(model), torch.no_grad():
        for round in range(-1, rounds):
            for record, call in zip(times, [reference, *calls]):
                start = time.perf_counter()
                call(x)
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                record.append(time.perf_counter() - start)
            if round == -1:  # the first round is for warming up
                times = [[] for _ in times]
            elif len(times[0]) >= at_least and time.perf_counter() - began > seconds:
                break
    return [[first / second for first, second in zip(times[0], record)] for record in times[1:]]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it.

    Args:
        module: whose parameters and buffers do not count.
        inputs: which do not count, either.

    Attributes:
        peak: the most bytes that live at one time.
    """

    def __init__(self, module: nn.Module, *inputs: Tensor):
        super().__init__()
        known = (*module.parameters(), *module.buffers(), *inputs)
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if storage._cdata not in self.known:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def memory_per_image(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass in eval mode needs for each of the images x (B, C, H, W), at its worst moment, beside
    the model and the images."""
    with evaluating(model), torch.no_grad(), PeakMemory(model, x) as memory:
        model(x)
    return memory.peak // len(x)
