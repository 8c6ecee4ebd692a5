"""Weights that are spread over the processes (FSDP2): whole for a checkpoint, and spread again."""
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gather(tree: Any) -> Any:
    """Tensors, alone or in dicts and lists, each as a whole; call it on every process where any is sharded."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), tree)


def spread_like(whole: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, sharded where an example of its shape is; call it on every process."""
    if not isinstance(example, DTensor) or whole.shape != example.shape:
        return whole
    return distribute_tensor(whole.to(example.device), example.device_mesh, example.placements)


def spread_weights(weights: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state dict as the module holds it."""
    return {key: spread_like(weights[key], own) for key, own in module.state_dict().items()}


def spread_optimizer(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state dict, in the order of the parameters of its groups."""
    spread = {index: {name: spread_like(value, parameters[index]) if isinstance(value, Tensor) else value
                      for name, value in moments.items()} for index, moments in state["state"].items()}
    return {**state, "state": spread}
