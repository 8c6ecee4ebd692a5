"""Memory at its peak."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from timm_selfdistill.cost import PeakMemory


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
    storages = {value.untyped_storage()._cdata: value.untyped_storage() for value in module.state_dict().values()}
    return memory.peak + sum(storage.nbytes() for storage in storages.values())
