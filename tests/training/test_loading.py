"""The loading processes of a run keep nothing of what they have read."""

import io
import os
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from timm_selfdistill import TrainConfig, load_images, model_data_config
from timm_selfdistill.training.data.loaders import train_batches

from ..conftest import small_backbone

IMAGES, FILES, SIZE = 4800, 24, 96


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """132 MB of images that cannot be compressed, in several files."""
    folder, draw = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    for number in range(FILES):
        files = [io.BytesIO() for _ in range(IMAGES // FILES)]
        for file in files:
            Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file, "png")
        rows = {"image": [{"bytes": file.getvalue()} for file in files], "label": [0, 1] * (len(files) // 2)}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"train-{number}.parquet", batch_size=50)
    datasets.Dataset.from_dict({key: column[:2] for key, column in rows.items()}, features).to_parquet(
        folder / "test-0.parquet"
    )
    return folder


def children() -> set[psutil.Process]:
    return set(psutil.Process(os.getpid()).children())


def own_memory(processes: set[psutil.Process]) -> float:
    """MB of the largest of them, but for what it shares with files."""
    lines = [line for process in processes for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()]
    return max(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_memory_is_flat(streaming, noise):
    images = load_images(noise, streaming=streaming)
    data, _ = images.transformed(model_data_config(small_backbone(), 32, 3))
    steps = {"steps_per_epoch": IMAGES // 16, "shuffle_buffer": 50} if streaming else {}
    accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))
    batches = train_batches(data, TrainConfig(batch_size=16, workers=2, **steps), accelerator)
    memory, others = [], children()
    for number, _ in enumerate(batches.batches(0, 0)):
        if number % 10 == 9 and len(children() - others) == 2:  # until one has come to its end
            memory.append(own_memory(children() - others))
    assert len(memory) >= 27
    quarter = len(memory) // 4
    second, last = mean(memory[quarter : 2 * quarter]), mean(memory[-quarter:])
    assert last - second < 11, memory  # of 33 MB that each process reads in between; it goes up and down with the files
