"""Given a trained network that must not change, whose exits give more accuracy for the compute: ours or earlyon's?

Fashion-MNIST, few images and epochs, no augmentation. Two networks are trained plainly, by `Trainer` with SGD:
`tf_efficientnet_lite0` from its ImageNet weights (48 px), `resnet18` from scratch (32 px). On each, frozen, both
libraries train exits at the same places: on the same images, for the same epochs, with Adam at 0.001, batches of 64, no
weight decay. "ours" is `wrap_self_distill(backbone, freeze_backbone=True)` with `SelfDistillTask`, "earlyon" is
`custom_ee` and `stage2_train_exits` of earlyon 0.3.0, "earlyon, 20 epochs" the same for longer, its default; with
--methods linear there is also "ours, linear", with smaller heads. Static networks are smaller ones trained from scratch
on the same images for as long as the ResNet.

Each library calibrates temperatures and thresholds on images that nobody trained with, for budgets of 25 to 100 % of
the network's multiply-adds without exits. earlyon has two calibrators, which take a grid of thresholds: of all that
they find with its own grid and with a fine one, the policy that is most accurate on the calibration images within the
budget counts. The first images of the test file say what that gives: accuracy, and mean multiply-adds with every head
that an image passes, counted in the same way for both. A seed draws weights, training and calibration images.

Between measured points accuracy is interpolated linearly; above the last one the rest of the budget is not used, since
no thresholds were found that gain from it. Differences are paired by seed, with 95 % t-intervals. A static network
counts at a budget that it keeps, the most accurate one.

    apt-get install dataset-fashion-mnist
    pip install -e ".[bench,examples]"
    python benchmarks/frozen_vs_earlyon.py
    python benchmarks/frozen_picture.py         # the picture again, from the figures

Finished parts are kept in --folder: a run that was stopped goes on where it was. Other settings need another folder.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from earlyon.models import custom_ee
from fashion_mnist import read_idx
from frozen_curves import batches, our_curve, top1
from frozen_earlyon import earlyon_curve, train_exits
from frozen_picture import compare, compare_static, draw, print_table
from hardware import create_parser, write_json
from json_lines import append_line, read_lines
from timm.task import ClassificationTask, TrainingTask
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, wrap_self_distill
from timm_selfdistill.cost import count_cost

EXAMPLES = Path(__file__).parents[1] / "examples"
NETWORKS: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0": {"in_chans": 3, "size": 48, "pretrained": True, "static": ["lcnet_100", "lcnet_075"]},
    "resnet18": {"in_chans": 1, "size": 32, "pretrained": False, "static": ["resnet18, 44 wide", "resnet18, 36 wide"]},
}
METHODS = ["exits", "longer", "static", "linear"]
LONGER = "earlyon, 20 epochs"
"""Its default; more than ours get."""
Data = dict[str, TensorDataset]
"""Of "train", "calibration" and "test"."""


def main() -> None:
    parser = create_parser(__doc__, batch_size=64, rounds=3)
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=METHODS[:3], choices=METHODS, help="in this order")
    parser.add_argument("--train-images", type=int, default=4096)
    parser.add_argument("--calibration-images", type=int, default=3000)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--fine-tune-epochs", type=int, default=3, help="of the pretrained network")
    parser.add_argument("--scratch-epochs", type=int, default=5, help="of the others")
    parser.add_argument("--exit-epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path, default="output/frozen_vs_earlyon", help="of finished parts")
    parser.add_argument("--picture", default="docs/images/frozen_vs_earlyon.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    args.folder.mkdir(parents=True, exist_ok=True)
    rows = read_lines(args.folder / "rows.jsonl")
    for network, seed, method in parts(args):
        if not any((row["network"], row["seed"], row["method"]) == (network, seed, method) for row in rows):
            row = {"network": network, "seed": seed, "method": method, **measure_method(network, seed, method, args)}
            rows.append(row)
            append_line(args.folder / "rows.jsonl", row)
            print(
                f"{network}, seed {seed}, {method}: exits " + " ".join(f"{value:.2f}" for value in row["exit_top1"]),
                flush=True,
            )
    comparisons, static = compare(rows), compare_static(rows)
    print_table(comparisons, static)
    settings = {
        key: value for key, value in vars(args).items() if key.endswith(("images", "epochs")) or key == "batch_size"
    }
    write_json(args.output, args.device, [{**settings, "seeds": args.rounds}, *rows, *comparisons, *static])
    draw(Path(args.output), Path(args.picture))


def parts(args: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Network, seed and method."""
    for kind in args.methods:
        for seed in range(args.rounds):
            for network in args.models:
                methods = {
                    "exits": ["ours", "earlyon"],
                    "longer": [LONGER],
                    "linear": ["ours, linear"],
                    **NETWORKS[network],
                }[kind]
                yield from ((network, seed, method) for method in methods)


def measure_method(network: str, seed: int, method: str, args: argparse.Namespace) -> dict[str, Any]:
    settings = NETWORKS[network]
    data = load_data(settings["size"], settings["in_chans"], seed, args)
    size = (settings["in_chans"], settings["size"], settings["size"])
    torch.manual_seed(seed)
    if method in settings["static"]:
        plain = count_cost(create(network, settings["in_chans"]), size).macs
        model = train_plain(create(method, settings["in_chans"]), data, seed, args)
        accuracy = evaluate(model, data["test"])
        return {"exit_top1": [accuracy], "points": [{"share": count_cost(model, size).macs / plain, "top1": accuracy}]}
    backbone = load_backbone(network, seed, data, args)
    torch.manual_seed(seed)
    if method.startswith("earlyon"):
        rows = wrap_self_distill(backbone).summary(size)[:-1]
        model = custom_ee(backbone, [row.module for row in rows[:-1]], 10, input_shape=(1, *size))
        train_exits(model.eval(), data["train"], args.batch_size, 20 if method == LONGER else args.exit_epochs)
        macs = [row.macs - row.head_macs for row in rows]
        return earlyon_curve(model.eval(), macs, data["calibration"], data["test"], seed)
    head = "linear" if method == "ours, linear" else "bottleneck"
    model = wrap_self_distill(backbone, head=head, freeze_backbone=True)
    fit(
        SelfDistillTask(model),
        data["train"],
        data,
        args,
        seed=seed,
        epochs=args.exit_epochs,
        opt="adam",
        lr=1e-3,
        sched="none",
        warmup_epochs=0,
        weight_decay=0,
    )
    return our_curve(model.eval(), data["calibration"], data["test"], seed)


def load_data(size: int, in_chans: int, seed: int, args: argparse.Namespace) -> Data:
    """Images (C, size, size) from -1 to 1; training and calibration images are drawn from the training file."""
    order = torch.randperm(60000, generator=torch.Generator().manual_seed(seed))
    train, calibration = order.split([args.train_images, 60000 - args.train_images])
    rows = {
        "train": ("train", train),
        "calibration": ("train", calibration[: args.calibration_images]),
        "test": ("t10k", torch.arange(args.test_images)),
    }
    data = {}
    for name, (prefix, chosen) in rows.items():
        images = torch.tensor(read_idx(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28))[chosen]
        labels = torch.tensor(read_idx(f"{prefix}-labels-idx1-ubyte.gz", 8))[chosen].long()
        resized = F.interpolate(images / 127.5 - 1, size=(size, size), mode="bilinear")
        data[name] = TensorDataset(resized.expand(-1, in_chans, -1, -1), labels)
    return data


def create(name: str, in_chans: int, **kwargs: Any) -> nn.Module:
    """A timm model; "resnet18, 36 wide" begins with 36 channels instead of 64."""
    name, _, width = name.removesuffix(" wide").partition(", ")
    if width:
        kwargs["channels"] = tuple(int(width) * factor for factor in (1, 2, 4, 8))
    return timm.create_model(name, num_classes=10, in_chans=in_chans, **kwargs)


def load_backbone(network: str, seed: int, data: Data, args: argparse.Namespace) -> nn.Module:
    """The trained network, the same for all methods."""
    settings, path = NETWORKS[network], args.folder / f"{network}-{seed}.pt"
    if not path.exists():
        model = create_pretrained() if settings["pretrained"] else create(network, settings["in_chans"])
        model = train_plain(model, data, seed, args, settings["pretrained"])
        torch.save(model.state_dict(), path.with_suffix(".new"))  # a kill leaves no half of a file
        path.with_suffix(".new").rename(path)
    model = create(network, settings["in_chans"])
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(memory_format=torch.channels_last)


def create_pretrained() -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, EXAMPLES / "efficientnet_lite0.py", folder], check=True)
        model = create(f"local-dir:{folder}", 3, pretrained=True)
    nn.init.zeros_(model.get_classifier().weight)  # timm's random ones are too large to be unlearned in a few epochs
    return model


def train_plain(
    model: nn.Module, data: Data, seed: int, args: argparse.Namespace, pretrained: bool = False
) -> nn.Module:
    epochs, lr = (args.fine_tune_epochs, 0.02) if pretrained else (args.scratch_epochs, 0.05)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    fit(task, data["train"], data, args, seed=seed, epochs=epochs, opt="sgd", lr=lr)
    return model.eval()


def fit(task: TrainingTask, train: Dataset, data: Data, args: argparse.Namespace, **settings: Any) -> None:
    """What it evaluates after each epoch decides nothing: the last weights count."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        config = TrainConfig(output=folder, batch_size=args.batch_size, workers=0, channels_last=True, **settings)
        result = Trainer(task, train, Subset(data["calibration"], range(256)), config).fit()
    if result.interrupted_by:
        sys.exit(f"stopped by {result.interrupted_by.name}")


def evaluate(model: nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        return top1(torch.cat([model(x).argmax(1) == y for x, y in batches(data)]))


if __name__ == "__main__":
    main()
