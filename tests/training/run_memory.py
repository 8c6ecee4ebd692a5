"""A short run whose teacher is a memory; each process writes what it was taught and answered to OUTPUT/RANK.pt.

torchrun --nproc_per_node 2 tests/training/run_memory.py OUTPUT
"""

import os
import sys
from pathlib import Path

import timm
import torch

from timm_selfdistill import SelfDistillLoss, SelfDistillTask, TrainConfig, Trainer, wrap_self_distill

IMAGES, EPOCHS = 40, 3


def main(output: Path) -> None:
    torch.manual_seed(0)
    model = wrap_self_distill(timm.create_model("test_resnet", num_classes=5, in_chans=1))
    data = [(torch.randn(1, 32, 32), index % 5) for index in range(IMAGES)]
    config = TrainConfig(
        output=str(output / "run"), epochs=EPOCHS, batch_size=5, grad_accum_steps=2, workers=0, lr=0.01
    )
    trainer = Trainer(SelfDistillTask(model, SelfDistillLoss(teacher="memory")), data, data[:10], config)
    memory, passes = trainer.memory, []
    note, recall = memory.note, memory.recall

    def recalled(*args):
        passes.append({"update": trainer.state.updates, "indices": args[0], "remembered": recall(*args)})
        return passes[-1]["remembered"]

    def noted(indices, weight, answers):
        passes[-1]["answers"] = answers.clone()
        note(indices, weight, answers)

    memory.note, memory.recall = noted, recalled
    trainer.fit()
    for seen in passes:
        seen["remembered"] = tuple(seen["remembered"])
    torch.save({"passes": passes, "memory": memory.memory.state_dict()}, output / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
