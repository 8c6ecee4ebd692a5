"""Weights that are spread over the processes (FSDP2): prepared for it, whole for evaluation and checkpoints, and spread
again."""
import copy
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from ..config import TrainConfig

SHARDED_OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
"""Their state has the shapes of the parameters, and they treat each value alone."""


def prepare_to_shard(accelerator: Accelerator, task: TrainingTask, config: TrainConfig) -> nn.Module:
    """Make a task ready for FSDP2, on every process; Accelerate's `prepare` then spreads it over them.

    Returns:
        A whole copy of its model, which `gather_into` brings up to date. Only the task's forward pass may be called on
        sharded weights, by all processes at once, so that evaluating and saving need a model of their own.

    Raises:
        ValueError: the run wants what sharded weights do not have.
    """
    if config.opt not in SHARDED_OPTIMIZERS:
        raise ValueError(f"opt {config.opt!r} is not supported with FSDP; take {', '.join(SHARDED_OPTIMIZERS)}")
    for name in ("model_ema", "torchcompile", "head_warmup_epochs", "cache_features"):
        if getattr(config, name):
            raise ValueError(f"{name} is not supported with FSDP; leave it out, or train with configs/multi_gpu.yaml")
    # Sharded weights stay float32 and autocast lowers the precision, as without FSDP: batch norm runs only so.
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    task.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    for value in task.state_dict().values():  # else each process would give its part of its own first values
        value.copy_(_from_first(value.to(accelerator.device)))
    task._no_split_modules = block_classes(task)  # where Accelerate looks for them
    return copy.deepcopy(task.get_eval_model())


def block_classes(model: nn.Module) -> list[str]:
    """Names of the classes of a network's innermost blocks: parts of a Sequential or ModuleList that have parts with
    weights themselves, such as BasicBlock or ConvNeXtBlock. Each is gathered and let go on its own; where parts
    share weights (CoaT) the network as a whole is, and there are none."""
    if len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters())):
        return []
    containers = (nn.Sequential, nn.ModuleList)
    parts = [part for container in model.modules() if isinstance(container, containers) for part in container
             if not isinstance(part, containers)]
    blocks = {part for part in parts if any(list(child.parameters()) for child in part.children())}
    return sorted({type(block).__name__ for block in blocks if blocks.isdisjoint(list(block.modules())[1:])})


def gather_into(whole: nn.Module, sharded: nn.Module) -> None:
    """Give a whole copy the weights that are trained; call it on every process."""
    whole.load_state_dict(gather(sharded.state_dict()))


def share_statistics(model: nn.Module) -> None:
    """Give every process the first one's statistics of batch norm, as DistributedDataParallel does."""
    buffers = [buffer for part in model.modules() if isinstance(part, _BatchNorm)
               for buffer in part.buffers() if buffer.is_floating_point()]
    if buffers:
        flat = _from_first(torch.cat([buffer.flatten() for buffer in buffers]))
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(part.view_as(buffer))


def gather(tree: Any, keep: bool = True) -> Any:
    """Tensors, alone or in dicts and lists; sharded ones as a whole, one after the other. Call it on every process
    where any is sharded.

    Args:
        keep: in the processor's memory; False puts None in their place.
    """
    def whole(tensor: DTensor) -> Tensor | None:
        full = tensor.full_tensor()
        return full.detach().cpu() if keep else None

    return tree_map_only(DTensor, whole, tree)


def spread_like(whole: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, sharded where an example of its shape is; call it on every process."""
    if not isinstance(example, DTensor) or whole.shape != example.shape:
        return whole
    return distribute_tensor(whole.to(example.device), example.device_mesh, example.placements)


def spread_weights(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as a module holds its own."""
    return {key: spread_like(weights[key], value) for key, value in own.items()}


def spread_optimizer(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state dict, in the order of the parameters of its groups."""
    spread = {index: {name: spread_like(value, parameters[index]) if isinstance(value, Tensor) else value
                      for name, value in moments.items()} for index, moments in state["state"].items()}
    return {**state, "state": spread}


def _from_first(tensor: Tensor) -> Tensor:
    """Overwritten with the first process's; on the device."""
    dist.broadcast(tensor, 0)
    return tensor
