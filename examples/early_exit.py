"""Train, calibrate, and let easy images leave early, from Python.

    python examples/early_exit.py                                     # trains resnet18 on examples/data first
    python examples/early_exit.py --model runs/first/best --data-dir FOLDER
"""
from pathlib import Path

import timm
from rich import print
from timm.data import resolve_model_data_config
from torch.utils.data import DataLoader

from timm_selfdistill import (
    EarlyExit,
    SelfDistillModel,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
    model_data_config,
    wrap_self_distill,
)
from timm_selfdistill.cli import Parser, Record, read_record, run
from timm_selfdistill.cost import measure_speedups


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=str(Path(__file__).parent / "data"), help="images, as of train.py")
    parser.add_argument("--model", metavar="ID", help="saved model or repository (default: train one)")
    parser.add_argument("--max-accuracy-drop", type=float, default=1.0, help="points below the plain network")
    parser.add_argument("--output", default="output/early_exit", help="folder for the calibrated model")
    args = parser.parse_args()

    record = read_record(args.model) if args.model else Record("")
    share, seed = record.fraction or (0.1, 42)  # as the run drew them, the images that it did not train on
    images = load_images(args.data_dir, val_fraction=share, seed=seed)
    model = SelfDistillModel.from_pretrained(args.model) if args.model else train(images)
    if names := model.backbone.pretrained_cfg.get("label_names"):
        images = images.in_order(names)
    _, held_out = images.transformed(resolve_model_data_config(model.backbone))
    loader = DataLoader(held_out, batch_size=100)

    early_exit = EarlyExit(model)
    report = early_exit.calibrate(loader, max_accuracy_drop=args.max_accuracy_drop)
    print(report)
    if not report.met:
        return 1
    x, _ = next(iter(loader))
    output = early_exit.predict(x)
    for logits, exit, confidence in list(zip(*output))[:10]:
        print(f"exit {exit}, class {logits.argmax()}, {confidence:.0%} sure")
    (speedup,) = measure_speedups(model, model.backbone, [early_exit.predict], x)
    print(f"{len(x)} images at once: {speedup:.2f} times as fast as the plain network")

    model.save_pretrained(args.output)
    print(f"saved in {args.output}; EarlyExit(SelfDistillModel.from_pretrained('{args.output}')) does the same")
    return 0


def train(images) -> SelfDistillModel:
    backbone = timm.create_model("resnet18", num_classes=images.num_classes)
    config = model_data_config(backbone, images.fitting_size(backbone), class_names=images.class_names)
    model = wrap_self_distill(backbone)
    Trainer(SelfDistillTask(model), *images.transformed(config), TrainConfig()).fit()
    return model.cpu().eval()


if __name__ == "__main__":
    run(main)
