"""Early exit without torch: numpy and onnxruntime, one ONNX file for each stage.

timm-selfdistill export runs/first/best --staged --output stages
python examples/onnx_early_exit.py stages picture.jpg another.jpg
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

POLICIES = {  # how sure an image is, more is surer; the threshold of "entropy" is an upper one
    "confidence": lambda p: p.max(1),
    "entropy": lambda p: (p * np.log(p.clip(1e-30))).sum(1),
    "margin": lambda p: np.diff(np.sort(p)[:, -2:])[:, 0],
}


def predict(folder: Path, about: dict, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (B, K) and exit (B,) of images (B, C, H, W); each leaves at the first exit that is sure enough."""
    probabilities, exits = None, np.zeros(len(images), int)
    rows, carried = np.arange(len(images)), [images]
    for exit, (stage, temperature) in enumerate(zip(about["stages"], about["temperatures"])):
        session = onnxruntime.InferenceSession(folder / stage["file"])
        logits, *carried = session.run(stage["outputs"], dict(zip(stage["inputs"], carried)))
        likely = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
        likely /= likely.sum(1, keepdims=True)
        leaves = np.full(len(rows), exit == len(about["stages"]) - 1)
        if not leaves.all() and (threshold := about["thresholds"][exit]) is not None:
            leaves = POLICIES[about["policy"]](likely) >= (-threshold if about["policy"] == "entropy" else threshold)
        probabilities = np.zeros((len(images), likely.shape[1])) if probabilities is None else probabilities
        probabilities[rows[leaves]], exits[rows[leaves]] = likely[leaves], exit
        rows, carried = rows[~leaves], [part[~leaves] for part in carried]
        if not len(rows):
            break
    return probabilities, exits


def open_upright(path: str, about: dict) -> Image.Image:
    """Turned as its EXIF data say, if they can be read; more than 8 bits a pixel are scaled to 8."""
    image = Image.open(path)
    image.load()
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if (kind := image.mode[0]) in "IF":
        values = np.nan_to_num(np.asarray(image, np.float64))
        full = (0, 65535) if kind == "I" else (0, 1) if values.min() >= 0 and values.max() <= 1 else (0, 255)
        black, white = about.get("value_ranges", {}).get(kind, full)
        steps, span = (256, white - black + 1) if kind == "I" else (255, white - black)
        image = Image.fromarray(((values - black) * steps / span).clip(0, 255).astype(np.uint8))
    return image


def load_image(path: str, about: dict) -> np.ndarray:
    """(C, H, W) as timm's transform makes it: the short side to the size over crop_pct, then the centre."""
    channels, height, width = about["input_size"]
    image = open_upright(path, about).convert("L" if channels == 1 else "RGB")
    size = [side * int(max(height, width) / about["crop_pct"]) // min(image.size) for side in image.size]
    image = image.resize(size, getattr(Image.Resampling, about["interpolation"].upper(), Image.Resampling.BICUBIC))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, channels) / 255
    return ((pixels - about["mean"]) / about["std"]).transpose(2, 0, 1).astype(np.float32)


if __name__ == "__main__":
    folder, *pictures = sys.argv[1:]
    about = json.loads((Path(folder) / "stages.json").read_text())
    likely, exits = predict(Path(folder), about, np.stack([load_image(path, about) for path in pictures]))
    for path, p, exit in zip(pictures, likely, exits):
        name = about["class_names"][p.argmax()] if about["class_names"] else f"class {p.argmax()}"
        print(f"{path}: {name} ({p.max():.1%}, exit {exit})")
