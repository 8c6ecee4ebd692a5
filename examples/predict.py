"""The classes that a model sees in a picture, a self-distilled one at any exit.

    python examples/predict.py image.jpg --model user/name
    python examples/predict.py image.jpg --model runs/first/best --exit 0     # the first exit: the fastest
    python examples/predict.py image.jpg --model runs/first/best --exit ensemble
    python examples/predict.py image.jpg --model local-dir:pretrained         # any of timm's, or hf-hub:ID
"""
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from timm_selfdistill import SelfDistillModel, load_pretrained
from timm_selfdistill.cli import Parser, parse_exit, read_record, run, saved_model
from timm_selfdistill.training import open_image


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("image", help="a picture in any format that Pillow reads")
    parser.add_argument("--model", required=True, metavar="ID", help="repository on the Hub, or a saved model")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--exit", default="-1", help="0 is the shallowest, -1 the deepest; ensemble is the mean of all")
    parser.add_argument("--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="black and white of an image with more than 8 bits (default: the full range of its type)")
    parser.add_argument("--topk", type=int, default=5, help="classes to print")
    args = parser.parse_args()
    if args.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {args.topk}")

    args.model = saved_model(args.model)
    if args.model.startswith(("local-dir:", "hf-hub:")):
        model = backbone = timm.create_model(args.model, pretrained=True).eval()
    else:
        model = load_pretrained(args.model, revision=args.revision)
        backbone = model.backbone
    if not isinstance(model, SelfDistillModel) and args.exit != "-1":
        raise ValueError(f"{args.model} has one exit only; leave out --exit")
    config = resolve_model_data_config(backbone)
    known = None if model is backbone else read_record(args.model, args.revision).value_range
    image = open_image(args.image, config["input_size"][0], args.value_range or known)
    with torch.no_grad():
        x = create_transform(**config)(image)[None]
        logits = model.predict(x, parse_exit(args.exit)) if isinstance(model, SelfDistillModel) else model(x)
        probabilities = logits[0].softmax(0)

    names = backbone.pretrained_cfg.get("label_names") or [f"class {i}" for i in range(model.num_classes)]
    for probability, index in zip(*probabilities.topk(min(args.topk, model.num_classes))):
        print(f"{probability:7.2%}  {names[index]}")
    return 0


if __name__ == "__main__":
    run(main)
