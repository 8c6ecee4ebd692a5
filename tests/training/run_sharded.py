"""Two processes: their gradients are those of one process with all their images; five steps with
DistributedDataParallel and with FSDP2 end in the same weights; a sharded state is saved and restored.

    torchrun --nproc_per_node 2 tests/training/run_sharded.py
"""
import copy

import timm
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

from timm_selfdistill import SelfDistillTask, TrainConfig, wrap_self_distill
from timm_selfdistill.training.data.loaders import train_batches
from timm_selfdistill.training.loop.sharding import gather
from timm_selfdistill.training.state.snapshot import TrainState, restore, take_snapshot

STEPS = 5
AVERAGES = torch.__version__ >= "2.9"
"""Gradients over the processes; torch 2.8's `fully_shard` adds them up where there are no GPUs."""


def shard(task: nn.Module) -> nn.Module:
    for block in task.trainable_module.backbone.stages:
        fully_shard(block)
    return fully_shard(task)


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)


def check_gradients(task: nn.Module, rank: int) -> None:
    alone, together = copy.deepcopy(task), nn.parallel.DistributedDataParallel(copy.deepcopy(task))
    alone(*(torch.cat(parts) for parts in zip(batch(0, 0), batch(1, 0))))["loss"].backward()
    together(*batch(rank, 0))["loss"].backward()
    for (name, own), other in zip(alone.named_parameters(), together.parameters()):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-5, atol=1e-5, msg=name)


def train(task: nn.Module, rank: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    for step in range(STEPS):
        task(*batch(rank, step))["loss"].backward()
        if isinstance(task, FSDPModule) and not AVERAGES:
            for parameter in task.parameters():
                parameter.grad /= torch.distributed.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def main() -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    torch.manual_seed(0)
    task = SelfDistillTask(wrap_self_distill(timm.create_model("test_convnext", num_classes=10), head="linear"))
    check_gradients(task, rank)
    replicated = nn.parallel.DistributedDataParallel(copy.deepcopy(task))
    sharded = shard(copy.deepcopy(task))
    assert isinstance(sharded, FSDPModule)
    train(replicated, rank)
    optimizer = train(sharded, rank)
    whole = gather(sharded.state_dict())
    for key, value in replicated.module.state_dict().items():
        torch.testing.assert_close(whole[key], value, rtol=1e-5, atol=1e-5, msg=key)

    config, state = TrainConfig(batch_size=4, workers=0), TrainState(8, 80)
    batches = train_batches(TensorDataset(torch.zeros(80)), config, accelerator)
    snapshot = take_snapshot(accelerator, sharded, optimizer, batches, state, config)
    holder = [snapshot]
    torch.distributed.broadcast_object_list(holder)
    fresh = shard(copy.deepcopy(task))
    other = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
    restore(accelerator, fresh, other, batches, state, config, holder[0])
    for (key, value), expected in zip(fresh.state_dict().items(), sharded.state_dict().values()):
        assert isinstance(value, DTensor) == isinstance(expected, DTensor), key
        assert torch.equal(gather(value), gather(expected)), key
    before, after = gather(optimizer.state_dict()), gather(other.state_dict())
    for index, moments in before["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, after["state"][index][name]), (index, name)
    if rank == 0:
        print("the same")
    accelerator.end_training()


if __name__ == "__main__":
    main()
