"""How long does it take to load a self-distilled model from disk?

Time of `SelfDistillModel.from_pretrained(folder)`, with all exits, over that of plain timm's
`timm.create_model("local-dir:folder", pretrained=True)`, the two in turn, medians. The files are in the system's cache.

    python benchmarks/load.py
"""

import tempfile
from functools import partial
from statistics import median

import timm
import torch
from hardware import create_parser, write_json
from timing import interleaved, median_ratio

from timm_selfdistill import SelfDistillModel, wrap_self_distill

NETWORKS = ["resnet18", "resnet50", "vit_small_patch16_224", "efficientnet_b0"]


def main() -> None:
    parser = create_parser(__doc__, batch_size=1, rounds=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="a network at least, where rounds are short")
    parser.add_argument("--models", nargs="+", default=NETWORKS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{'network':<28}{'timm ms':>10}{'ours ms':>10}{'ratio':>8}")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            wrap_self_distill(timm.create_model(name, num_classes=100)).save_pretrained(folder)
            plain, ours = interleaved(
                [
                    partial(timm.create_model, f"local-dir:{folder}", pretrained=True),
                    partial(SelfDistillModel.from_pretrained, folder),
                ],
                args.rounds,
                args.seconds,
            )
        row = {"network": name, "timm_ms": median(plain), "ours_ms": median(ours), "ratio": median_ratio(ours, plain)}
        rows.append(row)
        print(f"{name:<28}{row['timm_ms']:>10.1f}{row['ours_ms']:>10.1f}{row['ratio']:>8.3f}")
    write_json(args.output, args.device, rows)


if __name__ == "__main__":
    main()
