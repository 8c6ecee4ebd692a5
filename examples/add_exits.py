"""Give a trained network early exits without changing it: images are enough, labels are not needed.

python examples/add_exits.py FOLDER --model local-dir:pretrained --output runs/exits
timm-selfdistill calibrate runs/exits/best --data-dir LABELLED --max-accuracy-drop 1
"""

import timm
from rich.console import Console

from timm_selfdistill import (
    SelfDistillLoss,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    model_data_config,
    wrap_self_distill,
)
from timm_selfdistill.cli import Parser, run
from timm_selfdistill.training import own_class_names, print_exits, summary_title


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="folder of images, with labels or without")
    parser.add_argument("--model", required=True, metavar="ID", help="of timm, or local-dir:FOLDER, hf-hub:ID")
    parser.add_argument("--img-size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("--output", default="", metavar="DIR", help="run directory (default: named after the time)")
    args = parser.parse_args()

    backbone = timm.create_model(args.model, pretrained=True)
    images = load_images(args.images, unlabelled=True)
    print(*images.lines(), sep="\n")
    images = images.fitting_labels(backbone.num_classes, own_class_names(backbone))
    data_config = model_data_config(backbone, args.img_size)
    task = SelfDistillTask(wrap_self_distill(backbone, freeze_backbone=True), SelfDistillLoss.paper(alpha=1.0))
    config = TrainConfig(
        output=args.output,
        epochs=args.epochs,
        batch_size=args.batch_size,
        opt="adamw",
        lr=1e-3,
        unlabelled=True,
        cache_features=True,
        settings={"model": args.model, "pretrained": True},
    )
    result = Trainer(task, *images.transformed(data_config, no_aug=True), config).fit()
    if result.interrupted_by:
        print(f"stopped by {result.interrupted_by.name}; the exits so far are in {result.output}/last")
        return 128 + result.interrupted_by
    print_exits(Console(soft_wrap=True), summary_title(result.summary), result.summary["exits"])
    return 0


if __name__ == "__main__":
    run(main)
