"""The classes that a model sees in pictures, a self-distilled one at any exit; as `timm-selfdistill predict`.

python examples/predict.py image.jpg --model user/name
python examples/predict.py image.jpg --model runs/first --exit 0          # the first exit: the fastest
python examples/predict.py image.jpg --model runs/first --exit ensemble
python examples/predict.py image.jpg --model pretrained                   # a plain network of timm's layout
"""

from timm_selfdistill.cli import Parser, add_predict_flags, predict, run


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="+", help="a picture in any format that Pillow reads")
    parser.add_argument("--model", required=True, metavar="ID", help="run directory, saved model, or id on the Hub")
    add_predict_flags(parser)
    return predict(parser.parse_args())


if __name__ == "__main__":
    run(main)
