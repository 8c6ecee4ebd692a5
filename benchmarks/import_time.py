"""How much does `import timm_selfdistill` add to `import timm`?

Processor time of both imports, each in a new process, in turn; the medians and the median ratio.

    python benchmarks/import_time.py
"""

import subprocess
import sys
from statistics import median

import torch
from hardware import create_parser, write_json
from timing import median_ratio

IMPORT = "import time; import {}; print(time.process_time())"


def import_seconds(module: str) -> float:
    """Seconds of the processor, those of Python's own start included."""
    done = subprocess.run([sys.executable, "-c", IMPORT.format(module)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = create_parser(__doc__, batch_size=1, rounds=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import_seconds("timm_selfdistill")  # what is on disk is in memory from then on
    rounds = [(import_seconds("timm"), import_seconds("timm_selfdistill")) for _ in range(args.rounds)]
    timm, ours = zip(*rounds)
    row = {"timm_s": median(timm), "timm_selfdistill_s": median(ours), "ratio": median_ratio(ours, timm)}
    print("  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    write_json(args.output, args.device, [row])


if __name__ == "__main__":
    main()
