"""A short run with everything in it, which kills itself with SIGKILL at the moment that it is told.

    python tests/training/run_to_kill.py OUTPUT WORKERS [MOMENT NUMBER]

MOMENT is "update" (between backward and optimizer step), "evaluation", "checkpoint" (while its files are written), or
"rename" (they are written, but do not have their name yet), the NUMBERth of its kind in this process. What each update
saw goes to OUTPUT/seen-RANK.txt. With TEACHER=memory in the environment the teacher is a memory in files.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch

from timm_selfdistill import (
    SelfDistillLoss,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    model_data_config,
    wrap_self_distill,
)
from timm_selfdistill.training.loop import memory
from timm_selfdistill.training.loop.initial_weights import create_backbone
from timm_selfdistill.training.loop.update import Updater
from timm_selfdistill.training.outputs.metrics import ExitMeter
from timm_selfdistill.training.state import checkpoint

GLOBAL_BATCH, IMAGES, EPOCHS = 24, 205, 3
MOMENTS = {
    "update": (Updater, "_clip"),
    "evaluation": (ExitMeter, "update"),
    "checkpoint": (torch, "save"),
    "rename": (checkpoint, "_write_checksums"),
}


def kill_at(moment: str, number: int) -> None:
    place, name = MOMENTS[moment]
    real, calls = getattr(place, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        result = None if moment == "checkpoint" else real(*args, **kwargs)
        if calls[0] == number and int(os.environ.get("RANK", 0)) == int(os.environ.get("KILLED_RANK", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs) if moment == "checkpoint" else result

    setattr(place, name, counted)


def record(path: Path) -> None:
    """A line for each update: its number, and the hashes of the images that the network saw."""
    real = Updater.__call__

    def recording(self, group, epoch, update, position):
        hashes = (hashlib.sha256(image.numpy().tobytes()).hexdigest() for x, *_ in group for image in x)
        with path.open("a") as file:
            file.write(" ".join([str(update), *hashes]) + "\n")
        return real(self, group, epoch, update, position)

    Updater.__call__ = recording


def main(output: Path, workers: int) -> None:
    torch.manual_seed(0)
    images = load_images("examples/data")
    images.train, images.val = images.train.select(range(IMAGES)), images.val.select(range(30))
    backbone = create_backbone("test_resnet", None, pretrained=False, num_classes=10, in_chans=1, drop_rate=0.2)
    train, val = images.transformed(
        model_data_config(backbone, 32, 1), auto_augment="rand-m9-mstd0.5", color_jitter=None, re_prob=0.3
    )
    teacher = os.environ.get("TEACHER", "ensemble")
    memory.DEVICE_BYTES = 0
    world = int(os.environ.get("WORLD_SIZE", 1))
    config = TrainConfig(
        output=str(output),
        resume="auto",
        epochs=EPOCHS,
        batch_size=GLOBAL_BATCH // world,
        workers=workers,
        opt="adamw",
        lr=1e-3,
        mixup=0.2,
        mixup_prob=0.5 if teacher == "memory" else 1.0,
        smoothing=0.1,
        model_ema=True,
        model_ema_decay=0.9,
        grad_accum_steps=2,
        clip_grad=1.0,
        checkpoint_interval="2",
        log_interval=3,
    )
    output.mkdir(parents=True, exist_ok=True)
    record(output / f"seen-{os.environ.get('RANK', 0)}.txt")
    Trainer(SelfDistillTask(wrap_self_distill(backbone), SelfDistillLoss(teacher=teacher)), train, val, config).fit()


if __name__ == "__main__":
    if len(sys.argv) > 3 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # once
        kill_at(sys.argv[3], int(sys.argv[4]))
    main(Path(sys.argv[1]), int(sys.argv[2]))
