"""Where does the wall time of a training run go, and how long does timm's train.py take for the same work?

Both train the same plain network on the same folder of JPEG files with the same settings: an epoch's images, its
validation images, a checkpoint after each epoch. The two in turn, each in a process of its own, medians; the parts of
ours are measured in the run itself:

    start       until the first update: Python, imports, images found, network and workers made
    loading     waiting for images
    steps       updates
    evaluation  validation images
    saving      checkpoints and saved models
    pictures    curves.png, exits.png, history.csv
    end         after the last epoch: summary, speed-ups, the end of the process

    git clone https://github.com/huggingface/pytorch-image-models
    python benchmarks/run.py --train-script pytorch-image-models/train.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

from hardware import create_parser, write_json
from loading import write_photographs
from timing import median_ratio

PARTS = ("start", "loading", "steps", "evaluation", "saving", "pictures", "end")


def main() -> None:
    if sys.argv[1:2] == ["--timed"]:
        timed_run(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = create_parser(__doc__, batch_size=32, rounds=5)
    parser.add_argument("--train-script", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1600, help="for training; a fifth as many for validation")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("-j", "--workers", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_photographs(images / "train", args.images)
        write_photographs(images / "val", args.images // 5)
        common = [f"--data-dir={images}", f"--model={args.model}", "--num-classes=2", f"--img-size={args.img_size}"]
        common += [f"--batch-size={args.batch_size}", f"--epochs={args.epochs}", f"--workers={args.workers}"]
        common += ["--opt=sgd", "--lr=0.01", "--sched=cosine", "--warmup-epochs=0", f"--device={args.device}"]
        theirs, ours, parts = [], [], []
        for round in range(args.rounds + 1):  # the first is for warming up
            place = Path(folder) / str(round)
            theirs.append(timed([str(args.train_script), *common, f"--output={place / 'timm'}"], args.threads))
            record = place / "parts.json"
            ours.append(
                timed(
                    [__file__, "--timed", str(record), *common, "--method=plain", f"--output={place / 'ours'}"],
                    args.threads,
                )
            )
            parts.append(json.loads(record.read_text()))
        parts, theirs, ours = parts[1:], theirs[1:], ours[1:]
    shares = {name: median(row[name] for row in parts) for name in PARTS if name != "end"}
    shares["end"] = median(total - sum(row.values()) for total, row in zip(ours, parts))
    row = {
        "model": args.model,
        "img_size": args.img_size,
        "batch_size": args.batch_size,
        "images": args.images,
        "epochs": args.epochs,
        "workers": args.workers,
        "timm_s": median(theirs),
        "ours_s": median(ours),
        "ratio": median_ratio(ours, theirs),
        **{f"{name}_s": seconds for name, seconds in shares.items()},
    }
    print(f"timm's train.py {row['timm_s']:.1f} s, ours {row['ours_s']:.1f} s, ratio {row['ratio']:.3f}")
    print("  ".join(f"{name} {seconds:.2f} s" for name, seconds in shares.items()))
    write_json(args.output, args.device, [row])


def timed(command: list[str], threads: int) -> float:
    """Seconds of a process."""
    settings = {"OMP_NUM_THREADS": str(threads), "BEGAN": repr(time.time())}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-1000:]}")
    return time.perf_counter() - began


def timed_run(record: Path, argv: list[str]) -> None:
    """A run of ours that writes down how long its parts took."""
    from timm_selfdistill.cli.train import train
    from timm_selfdistill.training.data.loaders import IndexedBatches
    from timm_selfdistill.training.loop import trainer
    from timm_selfdistill.training.loop.update import Updater

    seconds = dict.fromkeys(PARTS[:-1], 0.0)
    clock = Clock(seconds)
    clock.watch(trainer.Trainer, "_measure", "evaluation")
    clock.watch(trainer.Trainer, "_save_model", "saving")
    clock.watch(trainer.Trainer, "_save_checkpoint", "saving")
    clock.watch(trainer.Trainer, "_draw_missing", "pictures")
    clock.watch(Updater, "__call__", "steps")
    report = trainer.report_history
    trainer.report_history = clock.timing(report, "pictures")
    batches = IndexedBatches.batches

    def timed_batches(self: IndexedBatches, epoch: int, images: int) -> Iterator[Any]:
        if not seconds["start"]:
            seconds["start"] = time.time() - float(os.environ["BEGAN"])
        found = batches(self, epoch, images)
        while True:
            with clock.part("loading"):
                batch = next(found, None)
            if batch is None:
                return
            yield batch

    IndexedBatches.batches = timed_batches
    if train(argv):
        sys.exit(1)
    record.write_text(json.dumps(seconds))


class Clock:
    """Adds up how long calls take; of one within another, only the outer."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.running = seconds, False

    def part(self, name: str) -> "Part":
        return Part(self, name)

    def timing(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed

    def watch(self, kind: type, method: str, name: str) -> None:
        setattr(kind, method, self.timing(getattr(kind, method), name))


class Part:
    def __init__(self, clock: Clock, name: str):
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.outer = not self.clock.running
        self.clock.running = True
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self.outer:
            self.clock.seconds[self.name] += time.perf_counter() - self.began
            self.clock.running = False


if __name__ == "__main__":
    main()
