"""A run on several processes of which one fails: run_failing.py OUTPUT RANK WHERE.

Where it is "staying", the process that fails lives on.
"""

import sys
import time

import timm
import torch
from torch.utils.data import Dataset

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, wrap_self_distill
from timm_selfdistill.training.outputs.saved_models import SavedModels
from timm_selfdistill.training.runtime import accelerator as failures


class Images(Dataset):
    """Those from some number on cannot be read on one process."""

    def __init__(self, unreadable: bool):
        self.unreadable = unreadable

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.unreadable and index >= 40:
            raise ValueError(f"image {index} cannot be read")
        return torch.zeros(3, 32, 32), index % 4


def fail(*_: object) -> None:
    raise ValueError("the model cannot be saved")


def main() -> None:
    output, failing, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    failures.END_SECONDS = 2.0 if where == "staying" else failures.END_SECONDS
    torch.manual_seed(0)
    task = SelfDistillTask(wrap_self_distill(timm.create_model("test_resnet", num_classes=4)))
    config = TrainConfig(output=output, epochs=2, batch_size=8, workers=2 if where == "loading" else 0)
    train = Images(False)
    trainer = Trainer(task, train, Images(False), config)
    mine = trainer.accelerator.process_index == failing
    if mine and where == "saving":
        SavedModels.save = fail
    train.unreadable = mine and where != "saving"
    try:
        trainer.fit()
    except (ValueError, RuntimeError) as error:
        print(f"{trainer.accelerator.process_index}: {type(error).__name__}: {str(error).splitlines()[-1]}", flush=True)
        if mine and where == "staying":
            time.sleep(600)
        sys.exit(2)


main()
