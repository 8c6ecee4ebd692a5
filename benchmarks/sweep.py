"""Which of timm's architectures can be wrapped?

Without a flag, every name of `timm.list_models()` on the meta device: wrap, training forward, loss, backward, eval.
With --real, the smallest network of every class on real tensors: a training step, eval and every exit to the last bit,
save and load.

    python benchmarks/sweep.py                      # all names, half an hour on two cores
    python benchmarks/sweep.py --real --workers 1 --gigabytes 20    # one of every class, 15 minutes
    python benchmarks/sweep.py --real --models resnet18 vit_tiny_patch16_224

Finished rows are kept in --progress: a sweep that was stopped goes on where it was. At the end the figures go to
benchmarks/results and a table to docs/models.md (not with --models). --real needs the figures of the first line, and
20 GB for deepseek_vit_412m.
"""

import argparse
import json
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from hardware import write_json
from sweep_checks import check_meta, check_real
from sweep_page import write_page

RESULTS = Path("benchmarks/results")
OURS = "cifar_*"  # registered by this package, not timm's; tests/models/ has their checks
CHECKS = {"meta": check_meta, "real": check_real}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="real tensors, the smallest network of every class")
    parser.add_argument("--models", nargs="+", help="only these; nothing is written but --progress")
    parser.add_argument("--progress", type=Path, help="default: output/sweep/meta.jsonl or real.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=300, help="a network at most")
    parser.add_argument("--gigabytes", type=int, default=10, help="of memory a worker at most")
    args = parser.parse_args()

    kind = "real" if args.real else "meta"
    names = args.models or (smallest_of_every_class() if args.real else timm.list_models(exclude_filters=OURS))
    progress = args.progress or Path(f"output/sweep/{kind}.jsonl")
    progress.parent.mkdir(parents=True, exist_ok=True)
    done = read_progress(progress)
    left = [name for name in names if name not in done]
    print(f"{len(names)} networks, {len(names) - len(left)} of them done before ({progress})")
    with progress.open("a") as file:
        if file.tell():
            file.write("\n")  # the last row may be cut off
        for row in sweep(kind, left, args):
            done[row["name"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{row['name']:<44}{row['seconds']:>7.1f} s  {row['error'] or 'passed'}", flush=True)

    rows = [done[name] for name in names]
    failed = [row for row in rows if row["error"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} passed")
    if not args.models:
        write_json(RESULTS / f"sweep_{kind}.json", "cpu", rows)
        write_page(RESULTS)
    return 1 if failed and args.models else 0


def smallest_of_every_class() -> list[str]:
    path = RESULTS / "sweep_meta.json"
    if not path.exists():
        sys.exit(f"{path} is missing, which knows the sizes: run this without --real first")
    smallest: dict[str, dict[str, Any]] = {}
    rows = [row for row in json.loads(path.read_text())["rows"] if "class" in row]
    for row in sorted(rows, key=lambda row: (bool(row["error"]), row["params"])):
        smallest.setdefault(row["class"], row)
    return [row["name"] for row in smallest.values()]


def read_progress(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of networks that passed; what failed is tried again, and so is the row that was cut off in mid-line."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["name"]: row for row in rows if not row["error"]}


def sweep(kind: str, names: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every name, as they are finished; workers are replaced after 20 networks, so that memory stays low."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, prepare_worker, (args.gigabytes,), maxtasksperchild=20) as pool:
        rows = pool.imap_unordered(partial(check, kind, args.seconds), names)
        for _ in names:
            try:
                yield rows.next(timeout=args.seconds + 60)
            except multiprocessing.TimeoutError:
                sys.exit("a worker was killed, perhaps for its memory; run this again, with --workers 1")


def prepare_worker(gigabytes: int) -> None:
    """A network that needs too much fails alone, instead of being killed together with everything."""
    resource.setrlimit(resource.RLIMIT_DATA, (gigabytes << 30, gigabytes << 30))
    torch.set_num_threads(1)


def check(kind: str, seconds: int, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "error": None}
    began = time.perf_counter()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        CHECKS[kind](name, row)
    except Exception as error:  # the reason is the result
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    finally:
        signal.alarm(0)
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def give_up(signum: int, frame: Any) -> None:
    raise TimeoutError("took too long")


if __name__ == "__main__":
    sys.exit(main())
