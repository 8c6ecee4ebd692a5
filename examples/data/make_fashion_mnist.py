"""Make the parquet files in this folder: 6,000 training and 1,000 test images of Fashion-MNIST.

Fashion-MNIST is (c) 2017 Zalando SE, MIT licence (LICENSE-fashion-mnist). Debian's package has the original files:

    apt-get install dataset-fashion-mnist
    python examples/data/make_fashion_mnist.py
"""

import gzip
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_idx(name: str, header: int) -> np.ndarray:
    with gzip.open(SOURCE / name) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def make(prefix: str, per_class: int, target: Path) -> None:
    """The first `per_class` images of every class, in the order of the source."""
    images = read_idx(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz", 8)
    rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]))
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    data = {"image": [PILImage.fromarray(images[row]) for row in rows], "label": [int(labels[row]) for row in rows]}
    Dataset.from_dict(data, features=features).to_parquet(target)
    print(f"{target}: {len(rows)} images, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    folder = Path(__file__).parent
    make("train", 600, folder / "train.parquet")
    make("t10k", 100, folder / "test.parquet")
