"""Two processes, of which the second has less memory: both take the batch that it found.

torchrun --nproc_per_node 2 tests/training/run_batch_size.py
"""

import torch
from accelerate import Accelerator

from timm_selfdistill.training.loop.update import agree, search


def main() -> None:
    accelerator = Accelerator(cpu=True)
    most = 100 if accelerator.process_index else 300

    def attempt(batch_size: int) -> None:
        if batch_size > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    found = search(attempt, 5000)
    print(f"{found} became {agree(accelerator, found)}\n", end="", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
