"""Memory at its peak."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """The largest sum of the bytes of tensors that live at one time, those of a module and of all that is computed."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._look(list(module.state_dict().values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._look(tree_leaves(result))
        return result

    def _look(self, values: list[Any]) -> None:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for storage in (value.untyped_storage() for value in values if isinstance(value, Tensor)):
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))


def peak_memory(module: nn.Module, call: Callable[[], Any], device: str) -> int:
    """Bytes at the worst moment of a call: on a GPU as allocated, on a CPU the tensors that live."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    with PeakMemory(module) as memory:
        call()
    return memory.peak
