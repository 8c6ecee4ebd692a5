"""How long does it take to find the images of a large folder, and how much memory, over timm's own reader?

1,000,000 empty files in 1,000 class folders, listed in new processes in turn: seconds, and what the process's memory
grows by at its peak.

    python benchmarks/listing.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from hardware import create_parser, write_json
from timing import median_ratio

CODE = """
import resource, sys, time
import timm_selfdistill.training.data.finding
from timm.data import create_dataset
from timm_selfdistill import load_images
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
{}
assert found == {}
seconds = time.perf_counter() - began
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
READERS = {
    "timm": "dataset = create_dataset('', root=sys.argv[1], split='train'); found = len(dataset)",
    "ours": "images = load_images(sys.argv[1]); found = len(images.train_rows) + len(images.val_rows)",
}


def main() -> None:
    parser = create_parser(__doc__, batch_size=1, rounds=3)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000, help="of a class")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name in range(args.classes):
            place = Path(folder) / f"n{name:08d}"
            place.mkdir()
            for index in range(args.images):
                (place / f"n{name:08d}_{index}.JPEG").touch()
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in READERS}
        for _ in range(args.rounds + 1):
            for name, code in READERS.items():
                command = [sys.executable, "-c", CODE.format(code, args.classes * args.images), folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds, mebibytes = map(float, done.stdout.split())
                measured[name].append((seconds, max(mebibytes, 1 / 256)))  # one page at least
    rows = []
    for what, values in (("seconds", 0), ("mebibytes", 1)):
        timm, ours = ([one[values] for one in measured[name][1:]] for name in ("timm", "ours"))
        rows.append({"what": what, "timm": median(timm), "ours": median(ours), "ratio": median_ratio(ours, timm)})
        print("  ".join(f"{key} {value:.3f}" if key != "what" else value for key, value in rows[-1].items()))
    write_json(args.output, args.device, rows)


if __name__ == "__main__":
    main()
