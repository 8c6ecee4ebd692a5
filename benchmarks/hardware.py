"""What a benchmark ran on, and where its figures go."""
import json
import platform
from pathlib import Path
from typing import Any

import timm
import torch

import timm_selfdistill


def describe(device: str) -> dict[str, Any]:
    """Name of the processor or GPU, threads, and versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "timm_selfdistill": timm_selfdistill.__version__,
    }


def write_json(path: str | Path, device: str, command: str, rows: list[dict[str, Any]]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "hardware": describe(device), "rows": rows}, indent=2) + "\n")
    print(f"wrote {path}")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
