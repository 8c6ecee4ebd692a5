"""How many images a second does one loading process prepare, over timm's own loader on the same folder?

JPEG files of 500 x 375 pixels, cut out of the photographs that scikit-image and scikit-learn come with, are augmented
for training at 224 pixels with rand-m9; an epoch of each in turn, medians.

    python benchmarks/loading.py
"""

import random
import tempfile
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from hardware import create_parser, write_json
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from timing import interleaved, median_ratio
from timm.data import create_dataset, create_loader

from timm_selfdistill import TrainConfig, load_images
from timm_selfdistill.training.data.loaders import train_batches

CONFIG = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.95,
}
AUGMENTATION = {
    "auto_augment": "rand-m9",
    "hflip": 0.5,
    "color_jitter": 0.4,
    "re_prob": 0.0,
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
}


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files in two class folders."""
    photographs = [
        Image.fromarray(array).convert("RGB")
        for array in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images)
    ]
    draw = random.Random(0)
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        width = draw.randint(photograph.width // 2, photograph.width)
        height = min(width * 375 // 500, photograph.height)
        left, top = draw.randint(0, photograph.width - width), draw.randint(0, photograph.height - height)
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + width, top + height)).resize((500, 375)).save(path, quality=90)


def main() -> None:
    parser = create_parser(__doc__, batch_size=32, rounds=7)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), args.images)
        timm_loader = create_loader(
            create_dataset("", root=folder, is_training=True),
            CONFIG["input_size"],
            args.batch_size,
            is_training=True,
            interpolation="random",
            mean=CONFIG["mean"],
            std=CONFIG["std"],
            use_prefetcher=False,
            num_workers=args.workers,
            persistent_workers=True,
            **AUGMENTATION,
        )
        images = load_images(folder, val_fraction=0.01)
        images.train_rows = images.sampled_rows
        train, _ = images.transformed(CONFIG, interpolation="random", **AUGMENTATION)
        ours = train_batches(
            train,
            TrainConfig(batch_size=args.batch_size, workers=args.workers),
            SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu")),
        )
        epochs = iter(range(10**6))
        times = interleaved(
            [
                lambda: sum(len(x) for x, _ in timm_loader),
                lambda: sum(len(x) for x, *_ in ours.batches(next(epochs), 0)),
            ],
            args.rounds,
            0.0,
            warm_up=1,
        )
    seen = args.images // args.batch_size * args.batch_size
    speeds = [[1000 * seen / time for time in one] for one in times]
    row = {
        "timm_images_s": median(speeds[0]),
        "ours_images_s": median(speeds[1]),
        "ratio": median_ratio(speeds[1], speeds[0]),
    }
    print("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    write_json(args.output, args.device, [row])


if __name__ == "__main__":
    main()
