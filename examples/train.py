"""Train a self-distilled timm model, or with --method the plain one or one by another kind of distillation; the same as
`timm-selfdistill train`, but for the images in examples/data, which are trained on where no others are named.

    python examples/train.py                                    # resnet18 on the images in examples/data
    python examples/train.py --data-dir FOLDER --model resnet50 --pretrained --epochs 30
    python examples/train.py --config cifar100_resnet18
    python examples/train.py --method kd --kd-model-name runs/teacher
    torchrun --nproc_per_node 2 examples/train.py               # or: accelerate launch examples/train.py
"""

from pathlib import Path

from timm_selfdistill.cli import train_command

if __name__ == "__main__":
    train_command(default_data=Path(__file__).parent / "data")
