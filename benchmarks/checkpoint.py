"""How long does training stand still for a checkpoint?

A self-distilled network after an update, and the time until the next one may begin; beside it the time to copy its
state, which cannot be avoided, and until everything is on disk, which goes on in the background. Medians.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --device cuda
"""

import io
import tempfile
import time
from contextlib import redirect_stdout
from statistics import median
from typing import Any

import timm
import torch
from hardware import create_parser, write_json
from torch.utils._pytree import tree_map_only
from torch.utils.data import TensorDataset

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, wrap_self_distill


def main() -> None:
    parser = create_parser(__doc__, batch_size=4, rounds=10)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{'network':<12}{'MB':>8}{'stands still ms':>17}{'copy ms':>9}{'more ms':>9}{'written after ms':>18}")
    for name in args.models:
        row = measure(name, args.batch_size, args.rounds)
        rows.append({"network": name, **row})
        print(
            f"{name:<12}{row['megabytes']:>8.0f}{row['still_ms']:>17.1f}{row['copy_ms']:>9.1f}{row['more_ms']:>9.1f}"
            f"{row['written_ms']:>18.1f}"
        )
    write_json(args.output, args.device, rows)


def measure(name: str, batch_size: int, rounds: int) -> dict[str, Any]:
    data = TensorDataset(torch.randn(batch_size, 3, 64, 64), torch.zeros(batch_size, dtype=torch.long))
    task = SelfDistillTask(wrap_self_distill(timm.create_model(name, num_classes=1000)))
    still, copies, written = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(output=folder, epochs=1, batch_size=batch_size, workers=0, momentum=0.9)
        trainer = Trainer(task, data, data, config)
        with redirect_stdout(io.StringIO()):
            trainer.fit()
        state = trainer.update.task.state_dict(), trainer.update.optimizer.state_dict()
        tensors = [tensor for tensor in torch.utils._pytree.tree_leaves(state) if isinstance(tensor, torch.Tensor)]
        for _ in range(rounds):
            copies.append(timed(lambda: tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), state)))
            trainer.state.updates += 1
            began = time.perf_counter()
            trainer._save_checkpoint()
            still.append(1000 * (time.perf_counter() - began))
            trainer.run.checkpoints.wait()
            written.append(1000 * (time.perf_counter() - began))
    return {
        "megabytes": sum(tensor.nbytes for tensor in tensors) / 1e6,
        "still_ms": median(still),
        "copy_ms": median(copies),
        "more_ms": median(a - b for a, b in zip(still, copies)),
        "written_ms": median(written),
    }


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
