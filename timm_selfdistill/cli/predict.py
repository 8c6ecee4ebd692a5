"""predict: classify images, with a self-distilled model at any exit."""

import argparse
import os

import torch
from timm.data import create_transform

from ..model import SelfDistillModel
from ..timm_model import as_timm
from ..training import open_image
from .data_flags import add_preprocessing_flags
from .measured import as_range
from .opening import load_any_model, preprocessing
from .program import parse_exit, printable
from .record import read_record
from .saved import saved_model


def add_predict_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `predict`, except for model and images."""
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--exit",
        default="-1",
        help="exit to use: 0 is the first, -1 the deepest, ensemble the average of all (default: %(default)s)",
    )
    parser.add_argument("--topk", type=int, default=5, help="number of classes to print (default: %(default)s)")
    group = parser.add_argument_group("image", "defaults are the settings of the model's training run")
    group.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="pixel values of black and white in images with more than 8 bits (default: the full range of their type)",
    )
    add_preprocessing_flags(group)


def predict(args: argparse.Namespace) -> int:
    """Print the most likely classes of each image.

    Raises:
        ValueError: the exit does not exist, or an image cannot be read.
    """
    if args.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {args.topk}")
    record = read_record(saved_model(args.model), args.revision)
    model = load_any_model(record.model, record.revision)
    if not isinstance(model, SelfDistillModel) and args.exit != "-1":
        raise ValueError(f"{args.model} has only one exit; leave out --exit")
    config = preprocessing(model, record, args)
    transform, value_range = create_transform(**config), as_range(args.value_range) or record.value_range
    num_classes = as_timm(model).num_classes
    names = as_timm(model).pretrained_cfg.get("label_names") or [f"class {i}" for i in range(num_classes)]
    if missing := next((path for path in args.image if not os.path.isfile(path)), None):
        raise FileNotFoundError(f"{missing} does not exist; expected an image file")
    for path in args.image:
        with torch.no_grad():
            x = transform(open_image(path, config["input_size"][0], value_range))[None]
            logits = model.predict(x, parse_exit(args.exit)) if isinstance(model, SelfDistillModel) else model(x)
        if len(args.image) > 1:
            print(printable(f"{path}:"))
        for probability, index in zip(*logits[0].softmax(0).topk(min(args.topk, num_classes))):
            print(printable(f"{probability:7.2%}  {names[index]}"))
    return 0
