"""Train, calibrate, and let easy images leave early, from Python.

python examples/early_exit.py                                     # trains resnet18 on examples/data first
python examples/early_exit.py --model runs/first                  # calibrates on the images that it measured
"""

from pathlib import Path

import timm
from rich import print

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
from timm_selfdistill.cli import Parser, add_measuring_flags, open_data, read_data, read_record, run, saved_model
from timm_selfdistill.cost import measure_speedups

DATA = Path(__file__).parent / "data"


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="ID", help="run directory, saved model or repository (default: train one)")
    parser.add_argument("--max-accuracy-drop", type=float, default=2.0, help="points below the plain network")
    parser.add_argument("--output", default="output/early_exit", help="folder for the calibrated model")
    add_measuring_flags(parser)
    args = parser.parse_args()

    record = read_record(saved_model(args.model or train()))
    model = SelfDistillModel.from_pretrained(record.model, revision=record.revision)
    loader = open_data(model, record, read_data(args, record), args)  # of the run, unless flags say otherwise

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


def train() -> str:
    """The run directory of a self-distilled ResNet18."""
    images = load_images(DATA)
    backbone = timm.create_model("resnet18", num_classes=images.num_classes)
    config = model_data_config(backbone, images.fitting_size(backbone), class_names=images.class_names)
    task = SelfDistillTask(wrap_self_distill(backbone))
    result = Trainer(task, *images.transformed(config), TrainConfig(settings={"data_dir": str(DATA)})).fit()
    return str(result.output)


if __name__ == "__main__":
    run(main)
