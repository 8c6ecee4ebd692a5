"""Streams: every image once a pass, and on from any batch as if nothing had happened."""
import io
import itertools
import json
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, load_images, model_data_config, wrap_self_distill
from timm_selfdistill.training.loading import StreamedBatches, val_loader

from ..conftest import EMBEDDED, ROOT, TWO_PROCESSES, run_python, small_backbone, small_model

SHARDS = (40, 25, 9, 31, 18)
COUNT = sum(SHARDS)


def picture(index: int) -> bytes:
    """A PNG of 4 x 4 pixels that tells its number."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), index, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def numbers(image: Image.Image) -> torch.Tensor:
    """(1, 4, 4), with a random number in a corner, as augmentation would draw it."""
    pixels = torch.from_numpy(np.array(image)).float()
    pixels[0, 0] = torch.rand(())
    return pixels[None]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    begin = 0
    for number, size in enumerate(SHARDS):
        rows = {"image": [{"bytes": picture(i)} for i in range(begin, begin + size)],
                "label": [i % 10 for i in range(begin, begin + size)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"train-{number}.parquet", batch_size=7)
        begin += size
    datasets.Dataset.from_dict({key: column[:13] for key, column in rows.items()}, features).to_parquet(
        folder / "test-0.parquet")
    return folder


@pytest.fixture(scope="module")
def webdataset(tmp_path_factory):
    """Shards as timm and the webdataset package write them."""
    folder = tmp_path_factory.mktemp("webdataset")
    begin = 0
    for name, size in [*((f"train-{number:04d}", size) for number, size in enumerate(SHARDS)), ("validation-0000", 12)]:
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for index in range(begin, begin + size):
                for ending, content in (("png", picture(index)), ("cls", str(index % 10).encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        begin += size
    return folder


def streamed(folder, batch_size: int = 4, rank: int = 0, world: int = 1, **settings) -> StreamedBatches:
    images = load_images(folder, streaming=True, num_classes=10)
    train, _ = images.transformed(model_data_config(small_backbone(), 32, 1))
    train.transform = numbers
    config = TrainConfig(batch_size=batch_size, **{"steps_per_epoch": 10, "shuffle_buffer": 16, **settings})
    accelerator = SimpleNamespace(
        num_processes=world, process_index=rank, is_main_process=rank == 0, device=torch.device("cpu"))
    return StreamedBatches(train, config, accelerator, {"num_workers": config.workers, "persistent_workers": False})


def first_pass(batches: StreamedBatches) -> list[int]:
    """Numbers of the images of the first pass through the stream."""
    found = []
    while True:
        x, *_ = batches.next_batch()
        if batches.number:
            return found
        found += x[:, 0, 1, 1].long().tolist()


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_every_image_once(form, workers, request):
    found = first_pass(streamed(request.getfixturevalue(form), workers=workers))
    assert len(set(found)) == len(found)
    assert set(found) <= set(range(COUNT))
    assert len(found) > COUNT - 4 * max(workers, 1)  # each loading process leaves out its last, incomplete batch
    assert found != sorted(found)


@pytest.mark.parametrize("world", [2, 5])
def test_processes_share_the_images(parquet, world):
    shares = [first_pass(streamed(parquet, 1, rank, world, workers=1)) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == list(range(COUNT))


def test_shards_and_images_come_in_another_order_in_every_pass(parquet):
    batches = streamed(parquet, 1, workers=0)
    passes = [[int(batches.next_batch()[0][0, 0, 1, 1]) for _ in range(COUNT)] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(COUNT))
    assert passes[0] != passes[1]
    assert set(passes[0][:40]) != set(passes[1][:40])
    assert passes[0] != first_pass(streamed(parquet, 1, workers=0, seed=1))


@pytest.mark.parametrize(("form", "workers"), [("parquet", 0), ("parquet", 2), ("parquet", 3), ("webdataset", 2)])
def test_it_goes_on_from_any_batch(form, workers, request):
    """Through the end of a pass, also where loading processes come to their ends at different times."""
    folder, total = request.getfixturevalue(form), COUNT // 4 + 12
    batches, images, states = streamed(folder, workers=workers), [], []
    for _ in range(total):
        images.append(batches.next_batch()[0])
        states.append(batches.state_dict())
    assert batches.number == 1, "not through the end of a pass"
    for done in range(1, total, 3):
        resumed = streamed(folder, workers=workers)
        resumed.load_state_dicts([states[done - 1]])
        for expected in images[done:done + 8]:
            assert torch.equal(resumed.next_batch()[0], expected), done


def test_a_state_survives_a_checkpoint(parquet, tmp_path):
    batches = streamed(parquet, workers=2)
    batches.next_batch()
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == batches.state_dict()


def test_another_number_of_readers_is_refused(parquet):
    state = streamed(parquet, workers=2).state_dict()
    with pytest.raises(ValueError, match="1 processes with 2 loading processes each, this run has 1 with 1"):
        streamed(parquet, workers=1).load_state_dicts([state])


def test_files_are_divided_where_there_are_too_few(parquet):
    data = streamed(parquet, workers=0).stream.data
    assert data.rows.num_shards == 5
    assert data.share(0, 1, 8).rows.num_shards == sum(-(-size // 7) for size in SHARDS)  # a shard for each row group


def test_evaluation_counts_every_image_once(webdataset):
    images = load_images(webdataset, streaming=True, num_classes=10)
    _, val = images.transformed(model_data_config(small_backbone(), 32, 1))
    val.transform = numbers
    seen = []
    for rank in range(2):
        accelerator = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        for x, _ in val_loader(val, TrainConfig(batch_size=5, workers=1), accelerator):
            seen += x[:, 0, 1, 1].long().tolist()
    assert sorted(seen) == list(range(COUNT, COUNT + 12))


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    rows = {"image": [{"bytes": b"no image" if i % 5 == 0 else picture(i)} for i in range(1, 41)], "label": [0, 1] * 20}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    train = datasets.Dataset.from_dict(rows, features)
    train.to_parquet(tmp_path / "train.parquet")
    train.to_parquet(tmp_path / "test.parquet")
    def make(on_bad_sample: str) -> StreamedBatches:
        data, _ = load_images(tmp_path, streaming=True).transformed(model_data_config(small_backbone(), 32, 1))
        data.transform = numbers
        accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device="cpu")
        config = TrainConfig(
            batch_size=4, steps_per_epoch=8, workers=0, shuffle_buffer=40, on_bad_sample=on_bad_sample)
        return StreamedBatches(data, config, accelerator, {})

    batches = list(make("skip").batches(0, 0))
    assert sorted(torch.cat([x[:, 0, 1, 1] for x, *_ in batches]).tolist()) == [i for i in range(1, 41) if i % 5]
    assert 5 <= sum(int(left_out.sum()) for *_, left_out in batches) <= 8  # not those after the last good one
    with pytest.raises(ValueError, match="cannot read image"):
        list(make("raise").batches(0, 0))


def train(folder, output, **settings) -> Trainer:
    images = load_images(folder, streaming=True, num_classes=10)
    backbone = small_backbone(in_chans=1)
    data = images.transformed(model_data_config(backbone, 32, 1))
    config = TrainConfig(output=str(output), epochs=1, batch_size=4, workers=0, **settings)
    return Trainer(SelfDistillTask(wrap_self_distill(backbone)), *data, config)


def test_a_run_on_a_stream(webdataset, tmp_path):
    result = train(webdataset, tmp_path, steps_per_epoch=5, grad_accum_steps=2).fit()
    assert result.summary["epochs"] == 1
    record = json.loads((tmp_path / "best/config.json").read_text())["self_distill"]["metrics"]
    assert record["dataset"]["images"] == 12
    state = torch.load(next((tmp_path / "checkpoints").iterdir()) / "run.pt", weights_only=True)["state"]
    assert state["updates"] == 5


@pytest.mark.parametrize(("settings", "message"), [
    ({}, r"the stream does not tell its length; give steps_per_epoch \(--steps-per-epoch\)"),
    ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
])
def test_epochs_of_unknown_length(webdataset, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(webdataset, tmp_path, **settings)


def test_a_known_length_is_the_epoch(tmp_path):
    images = load_images(EMBEDDED, streaming=True)
    images.train.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=6000)})
    backbone = small_backbone(in_chans=1)
    data = images.transformed(model_data_config(backbone, 32, 1))
    config = TrainConfig(output=str(tmp_path), batch_size=64, workers=0)
    assert Trainer(SelfDistillTask(wrap_self_distill(backbone)), *data, config).updates_per_epoch == 6000 // 64


def test_steps_per_epoch_belong_to_streams(fashion_tensors, tmp_path):
    config = TrainConfig(output=str(tmp_path), steps_per_epoch=3, workers=0)
    with pytest.raises(ValueError, match="steps_per_epoch is for streamed images"):
        Trainer(SelfDistillTask(small_model(in_chans=1)), *fashion_tensors, config)


def test_too_few_images_for_a_batch(webdataset, tmp_path):
    run = train(webdataset, tmp_path, steps_per_epoch=2)
    run.batches.stream.batch_size = 500
    with pytest.raises(ValueError, match="process 0 of 1 reads does not fill a batch of 500"):
        run.fit()


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "does not say how many classes there are; give num_classes"),
    ({"num_classes": 3}, r"labels in column 'cls' must lie in 0..2, got \d"),
    ({"num_classes": 10, "val_split": "dev"}, "has no split 'dev'"),
    ({"num_classes": 10, "label_column": "__key__"}, "must hold class indices, got .*string"),
])
def test_streams_that_cannot_work(webdataset, arguments, message):
    def read() -> None:
        images = load_images(webdataset, streaming=True, **arguments)
        list(images.transformed(model_data_config(small_backbone(), 32, 1))[0])

    with pytest.raises((ValueError, TypeError), match=message):
        read()


def test_a_stream_without_a_validation_split(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(0)}], "label": [0]},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)}))
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has no validation split among 'train', and a stream cannot be divided"):
        load_images(tmp_path, streaming=True)


def test_webdataset_shards_without_streaming(webdataset):
    images = load_images(webdataset)
    assert (len(images.train), len(images.val), images.num_classes) == (COUNT, 12, 10)


def test_the_command_on_two_processes_is_resumed_exactly(parquet, tmp_path):
    """Stopped in the middle of its second epoch, and as if it had not been."""
    command = [str(ROOT / "examples/train.py"), "--data-dir", parquet, "--streaming", "--steps-per-epoch", 6, "--model",
               "test_resnet", "--img-size", 32, "--epochs", 2, "-b", 4, "-j", 2, "--checkpoint-interval", 4,
               "--shuffle-buffer", 10, "--checkpoint-hist", 9]
    run_python(*command, "--output", tmp_path / "a", launcher=TWO_PROCESSES)
    checkpoints = sorted((tmp_path / "a/checkpoints").iterdir())
    assert [path.name[-2:] for path in checkpoints] == ["04", "06", "08", "12"]
    run_python(*command, "--output", tmp_path / "b", "--resume", checkpoints[2], launcher=TWO_PROCESSES)
    for name in ("history.csv", "last/model.safetensors", "last/self_distill.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
