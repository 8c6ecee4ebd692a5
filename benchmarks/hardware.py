"""What all benchmarks share: their flags, what they ran on, and where their figures go."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import timm_selfdistill
from timm_selfdistill.training.runtime.accelerator import device_name


def describe(device: str) -> dict[str, Any]:
    """Name of the processor or GPU, threads, versions, and settings of glibc's memory."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "timm_selfdistill": timm_selfdistill.__version__,
        **{key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    }


def create_parser(description: str, batch_size: int, rounds: int) -> argparse.ArgumentParser:
    """The flags of every benchmark; the figures go to results/, under the name of the benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-b", "--batch-size", type=int, default=batch_size)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", default=f"benchmarks/results/{Path(sys.argv[0]).stem}.json")
    return parser


def write_json(path: str | Path, device: str, rows: list[dict[str, Any]]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", *sys.argv])
    head = json.dumps({"command": command, "hardware": describe(device)}, indent=2).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)  # a row a line: there may be a thousand
    path.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')
    print(f"wrote {path}")
