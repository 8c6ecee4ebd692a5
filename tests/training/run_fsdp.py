"""Two processes: runs with DistributedDataParallel and with Accelerate's FSDP2 end in the same weights, and those that
are resumed in the middle of an epoch in the same bits.

    torchrun --nproc_per_node 2 tests/training/run_fsdp.py DIRECTORY NETWORK...
"""
import sys
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import TensorDataset

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, wrap_self_distill
from timm_selfdistill.training.loop import trainer as trainer_module

create_accelerator = trainer_module.create_accelerator


def create_fsdp_accelerator(*args, **kwargs) -> Accelerator:
    """Accelerate turns FSDP on only where there are GPUs."""
    accelerator = create_accelerator(*args, **kwargs)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator),
                         torch.randint(10, (count,), generator=generator))


def make_task(name: str, seed: int = 0, **kwargs) -> SelfDistillTask:
    torch.manual_seed(seed)
    return SelfDistillTask(wrap_self_distill(timm.create_model(name, num_classes=10), head="linear", **kwargs))


def settings(output: Path, batch_size: int = 8, **changes) -> TrainConfig:
    return TrainConfig(output=str(output), epochs=2, batch_size=batch_size, workers=0, warmup_epochs=0,
                       grad_accum_steps=2, checkpoint_interval="1", checkpoint_hist=9, **{"lr": 0.02, **changes})


def fit(name: str, output: Path, fsdp: bool, freeze_backbone: bool = False, **changes) -> Trainer:
    """A run; its processes begin with other weights, of which those of the first count."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer_module.create_accelerator = create_fsdp_accelerator if fsdp else create_accelerator
    task = make_task(name, PartialState(cpu=True).process_index, freeze_backbone=freeze_backbone)
    trainer = Trainer(task, images(48), images(21), settings(output, **changes))
    trainer.fit()
    assert any(isinstance(part, FSDPModule) for part in trainer.update.task.modules()) == fsdp
    return trainer


def compare(first: Trainer, second: Trainer, tolerance: float) -> None:
    others = second.eval_model.state_dict()
    for key, value in first.eval_model.state_dict().items():
        torch.testing.assert_close(others[key], value, rtol=tolerance, atol=tolerance, msg=key)
    for own, other in zip(first.state.history, second.state.history, strict=True):
        assert own.keys() == other.keys()
        for key in own:
            assert abs(own[key] - other[key]) <= 10 * tolerance, (key, own[key], other[key])


RUNS = {
    "test_convnext": {"clip_grad": 1.0, "on_nan": "skip", "channels_last": True, "opt": "adamw", "lr": 1e-3},
    "test_resnet": {},
    "test_vit": {"freeze_backbone": True},
}


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        changes = RUNS[name]
        whole = fit(name, folder / name / "ddp", fsdp=False, **changes)
        sharded = fit(name, folder / name / "fsdp", fsdp=True, **changes)
        compare(whole, sharded, 1e-5)
        if "freeze_backbone" not in changes:
            resumed = fit(name, folder / name / "resumed", fsdp=True, **changes,
                          resume=str(folder / name / "fsdp/checkpoints/step-00000001"))
            compare(sharded, resumed, 0)
        if name == "test_convnext":
            changed = fit(name, folder / name / "changed", fsdp=True, **changes,
                          resume=str(folder / name / "ddp/checkpoints/step-00000001"))
            compare(whole, changed, 1e-5)
        if sharded.accelerator.is_main_process:
            print(f"{name}: the same", flush=True)
    sharded.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
