"""Streams: every image once a pass, and on from any batch as if nothing had happened."""

import io
import itertools
import json
import shutil
import tarfile
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from timm_selfdistill import SelfDistillTask, TrainConfig, Trainer, load_images, model_data_config, wrap_self_distill
from timm_selfdistill.training.data.images import read_image
from timm_selfdistill.training.data.loaders import StreamedBatches, ValBatches, train_batches

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
        rows = {
            "image": [{"bytes": picture(i)} for i in range(begin, begin + size)],
            "label": [i % 10 for i in range(begin, begin + size)],
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"train-{number}.parquet", batch_size=7)
        begin += size
    datasets.Dataset.from_dict({key: column[:13] for key, column in rows.items()}, features).to_parquet(
        folder / "test-0.parquet"
    )
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
        num_processes=world, process_index=rank, is_main_process=rank == 0, device=torch.device("cpu")
    )
    return StreamedBatches(train, config, accelerator, {"num_workers": config.workers, "persistent_workers": False})


def first_pass(batches: StreamedBatches) -> list[int]:
    """Numbers of the images of the first pass through the stream."""
    found = []
    while True:
        x, *_ = batches.next_batch()
        if batches.number:
            return found
        found += x[:, 0, 1, 1].long().tolist()


def test_the_length_of_an_epoch(parquet):
    """The stream does not tell it."""
    for repeats, images in ((0.0, 8), (2.5, 24), (0.5, 8)):  # at least once, as in timm
        batches = streamed(parquet, steps_per_epoch=None, train_num_samples=10, epoch_repeats=repeats)
        assert batches.epoch_images == images
    for name in ("epoch_repeats", "train_num_samples"):
        with pytest.raises(ValueError, match="steps_per_epoch already defines the length of an epoch"):
            streamed(parquet, **{name: 2})
    with pytest.raises(ValueError, match="aug_repeats does not work with streaming"):
        streamed(parquet, aug_repeats=3)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_every_image_once(form, workers, request):
    found = first_pass(streamed(request.getfixturevalue(form), workers=workers))
    assert len(set(found)) == len(found)
    assert set(found) <= set(range(COUNT))
    assert len(found) > COUNT - 4 * max(workers, 1)  # each loading process leaves out its last, incomplete batch
    assert found != sorted(found)


@pytest.mark.parametrize("world", [2, 3, *(pytest.param(world, marks=pytest.mark.slow) for world in (5, 7))])
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


@pytest.mark.parametrize(
    ("form", "workers"),
    [
        ("parquet", 0),
        *(
            pytest.param(form, workers, marks=pytest.mark.slow)
            for form, workers in (("webdataset", 2), ("parquet", 2), ("parquet", 3))
        ),
    ],
)
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
        for expected in images[done : done + 8]:
            assert torch.equal(resumed.next_batch()[0], expected), done


def test_a_state_survives_a_checkpoint(parquet, tmp_path):
    batches = streamed(parquet, workers=2)
    batches.next_batch()
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == batches.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 1}, "DataLoader workers 1 instead of 2"),
        ({"shuffle_buffer": 20}, "rows in a block 20 instead of 16"),
        ({"world": 5}, "processes 5 instead of 1"),
    ],
)
def test_another_division_is_refused(parquet, changes, message):
    state = streamed(parquet, workers=2).state_dict()
    with pytest.raises(ValueError, match=f"{message}.*; .*same processes, workers, files and shuffle_buffer"):
        streamed(parquet, **{"workers": 2, **changes}).load_state_dicts([state])


def test_other_files_are_refused(parquet, tmp_path):
    for path in parquet.glob("*.parquet"):
        if path.name != "train-3.parquet":
            shutil.copy(path, tmp_path)
    state = streamed(tmp_path, workers=2).state_dict()
    with pytest.raises(ValueError, match="shards 5 instead of 4"):
        streamed(parquet, workers=2).load_state_dicts([state])


def test_no_loading_process_reads_what_one_would():
    """`-j 0` and `-j 1` are the same."""
    for workers in (0, 1):
        images = load_images(EMBEDDED, streaming=True)
        part = images.transformed(model_data_config(small_backbone(), 32, 1))[0].split_by_node(1, 2, workers)
        assert part.shards == 1


def test_a_checkpoint_of_the_other_kind_is_refused(parquet, fashion_tensors):
    accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))
    indexed = train_batches(fashion_tensors[0], TrainConfig(workers=0), accelerator)
    with pytest.raises(ValueError, match="streamed images; .*with streaming"):
        indexed.load_state_dicts([streamed(parquet, workers=0).state_dict()])
    with pytest.raises(ValueError, match="not streamed; .*without streaming"):
        streamed(parquet, workers=0).load_state_dicts([indexed.state_dict()])


def test_whole_shards_where_there_are_enough(parquet):
    """20 row groups for 3 processes: 7, 7 and 6, not all of them for each."""
    parts = [streamed(parquet, 1, rank, 3, workers=1) for rank in range(3)]
    assert [part.stream.data.rows.num_shards for part in parts] == [7, 7, 6]
    assert {part.division["shards"] for part in parts} == {20}


def test_files_are_divided_where_there_are_too_few(parquet):
    data = streamed(parquet, workers=0).stream.data
    assert data.rows.num_shards == 5
    row_groups = sum(-(-size // 7) for size in SHARDS)
    assert data.split_by_node(0, 1, 8).rows.num_shards == row_groups == 20


def test_evaluation_counts_every_image_once(webdataset):
    images = load_images(webdataset, streaming=True, num_classes=10)
    _, val = images.transformed(model_data_config(small_backbone(), 32, 1))
    val.transform = numbers
    seen = []
    for rank in range(2):
        accelerator = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        for x, _ in ValBatches(val, TrainConfig(batch_size=5, workers=1), accelerator):
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
        config = TrainConfig(batch_size=4, steps_per_epoch=8, workers=0, shuffle_buffer=40, on_bad_sample=on_bad_sample)
        return StreamedBatches(data, config, accelerator, {})

    _, val = load_images(tmp_path, streaming=True).transformed(model_data_config(small_backbone(), 32, 1))
    val.transform = numbers
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    batches = ValBatches(val, TrainConfig(batch_size=4, workers=0, on_bad_sample="skip"), accelerator)
    assert sum(len(x) for x, _ in batches) == 32
    assert batches.unreadable == 8

    batches = list(make("skip").batches(0, 0))
    assert sorted(torch.cat([x[:, 0, 1, 1] for x, *_ in batches]).tolist()) == [i for i in range(1, 41) if i % 5]
    assert 5 <= sum(int(left_out.sum()) for _, _, left_out, _ in batches) <= 8  # not those after the last good one
    with pytest.raises(ValueError, match=r"image in row \d+:"):
        list(make("raise").batches(0, 0))


def test_rows_that_are_not_mixed(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(index)} for index in range(40)], "label": [index // 10 for index in range(40)]},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(4)}),
    )
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    data, _ = load_images(tmp_path, streaming=True).transformed(model_data_config(small_backbone(), 32, 1))
    accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device="cpu")
    config = TrainConfig(batch_size=4, steps_per_epoch=2, workers=0, shuffle_buffer=10)
    with pytest.warns(UserWarning, match="first 10 rows .* only 1 of 4 classes: .*leave out streaming"):
        StreamedBatches(data, config, accelerator, {}).next_batch()


def test_images_at_an_address():
    """As those of a streamed folder on the Hub, hf://datasets/..."""
    with fsspec.open("memory://folder/a.png", "wb") as file:
        file.write(picture(7))
    assert read_image({"bytes": None, "path": "memory://folder/a.png"}, "L").getpixel((0, 0)) == 7
    with pytest.raises(ValueError, match=r"image memory://folder/b\.png:"):
        read_image({"bytes": None, "path": "memory://folder/b.png"}, "L")


def test_a_connection_that_is_lost_ends_the_run_and_keeps_its_checkpoint(webdataset, tmp_path, monkeypatch):
    run = train(webdataset, tmp_path, steps_per_epoch=20, checkpoint_interval="4", on_bad_sample="skip")
    real, calls = datasets.IterableDataset.__iter__, itertools.count()

    def rows(self):
        for row in real(self):
            if next(calls) == 30:
                raise ConnectionError("the Hub is gone")
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", rows)
    run.batches.stream.block = 10
    with pytest.raises(ConnectionError, match="the Hub is gone"):
        run.fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"length of the stream .*steps_per_epoch \(--steps-per-epoch\)"),
        ({"steps_per_epoch": 0}, "^steps_per_epoch .*1, got 0"),
    ],
)
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
    with pytest.raises(ValueError, match="steps_per_epoch .*streamed images"):
        Trainer(SelfDistillTask(small_model(in_chans=1)), *fashion_tensors, config)


def test_too_few_images_for_a_batch(webdataset, tmp_path):
    run = train(webdataset, tmp_path, steps_per_epoch=2)
    run.batches.stream.batch_size = 500
    with pytest.raises(ValueError, match="process 0 of 1 .*batch of 500 .*batch_size .*workers"):
        run.fit()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"column 'cls' .*num_classes \(--num-classes\)"),
        ({"num_classes": 3}, r"column 'cls' .*0\.\.2, got \d"),
        ({"num_classes": 10, "val_split": "dev"}, "split 'dev'; .*'train', 'validation'"),
        ({"num_classes": 10, "label_column": "__key__"}, "'__key__' .*class indices, .*string.*leave out streaming"),
    ],
)
def test_streams_that_cannot_work(webdataset, arguments, message):
    def read() -> None:
        images = load_images(webdataset, streaming=True, **arguments)
        list(images.transformed(model_data_config(small_backbone(), 32, 1))[0])

    with pytest.raises((ValueError, TypeError), match=message):
        read()


def test_a_stream_without_a_validation_split(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(0)}], "label": [0]},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)}),
    )
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=rf"{tmp_path} .*validation split, .*\(--val-split\), .*leave out streaming"):
        load_images(tmp_path, streaming=True)


def test_one_split_streamed_and_one_not(parquet):
    splits = {
        "train": datasets.load_dataset(str(parquet), split="train"),
        "test": datasets.load_dataset(str(parquet), split="test", streaming=True),
    }
    with pytest.raises(TypeError, match="streamed .*got Dataset and IterableDataset"):
        load_images(splits)


def test_webdataset_shards_without_streaming(webdataset):
    images = load_images(webdataset)
    assert (len(images.train), len(images.val), images.num_classes) == (COUNT, 12, 10)


@pytest.mark.slow
def test_the_command_on_two_processes_is_resumed_exactly(parquet, tmp_path):
    """Stopped in the middle of its second epoch, and as if it had not been."""
    command = [
        str(ROOT / "examples/train.py"),
        "--data-dir",
        parquet,
        "--streaming",
        "--steps-per-epoch",
        6,
        "--model",
        "test_resnet",
        "--img-size",
        32,
        "--epochs",
        2,
        "-b",
        4,
        "-j",
        2,
        "--checkpoint-interval",
        4,
        "--shuffle-buffer",
        10,
        "--checkpoint-hist",
        9,
        "--grad-accum-steps",
        2,
        "--mixup",
        0.2,
        "--model-ema",
    ]
    run_python(*command, "--output", tmp_path / "a", processes=2)
    checkpoints = sorted((tmp_path / "a/checkpoints").iterdir())
    assert [path.name[-2:] for path in checkpoints] == ["04", "06", "08", "12"]
    run_python(*command, "--output", tmp_path / "b", "--resume", checkpoints[2], processes=2)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def assert_equal_runs(*runs) -> None:
    for name in ("history.csv", "last/model.safetensors", "last/self_distill.safetensors"):
        first, second = ((run / name).read_bytes() for run in runs)
        assert first == second, name


@pytest.mark.slow
def test_processes_with_other_hashes_train_the_same(parquet, tmp_path):
    """Each process that is started has another seed of Python's hashes; forks share theirs."""
    command = [
        str(ROOT / "examples/train.py"),
        "--data-dir",
        parquet,
        "--streaming",
        "--steps-per-epoch",
        6,
        "--model",
        "test_resnet",
        "--img-size",
        32,
        "--epochs",
        1,
        "-b",
        4,
        "-j",
        2,
    ]
    for seed in ("1", "2"):
        done = run_python(*command, "--output", tmp_path / seed, launcher=TWO_PROCESSES, PYTHONHASHSEED=seed)
        assert "Traceback" not in done.stderr
    assert_equal_runs(tmp_path / "1", tmp_path / "2")
