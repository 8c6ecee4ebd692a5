"""Runs whose teacher is the memory of each image's answers."""

import re
import signal

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import nn
from torch.utils.data import Subset

from timm_selfdistill import AnswerMemory, SelfDistillLoss, SelfDistillTask, TrainConfig, Trainer, load_images
from timm_selfdistill.memory import memory_bytes
from timm_selfdistill.training.data.sampling import NO_INDEX, Draw, TrainImages, image_numbers
from timm_selfdistill.training.data.transforms import TargetMixer
from timm_selfdistill.training.loop import memory as run_memory
from timm_selfdistill.training.loop.memory import FOLDER
from timm_selfdistill.training.loop.update import Updater, try_updates
from timm_selfdistill.training.state.checkpoint import MEMORY_FILE, find_checkpoint, list_checkpoints

from ..conftest import EMBEDDED, TWO_PROCESSES, run_python, small_model
from .run_memory import EPOCHS, IMAGES
from .test_trainer import fit, interrupt_after, same_weights, settings

DATA_CONFIG = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}


def make_task(frozen: bool = False, **loss) -> SelfDistillTask:
    torch.manual_seed(0)
    model = small_model(in_chans=1, freeze_backbone=frozen)
    return SelfDistillTask(model, SelfDistillLoss(**{"teacher": "memory", **loss}))


def make_trainer(output, data, task=None, **changes) -> Trainer:
    return Trainer(task or make_task(), *data, settings(output, **{"batch_size": 20, **changes}))


def content(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.memory.memory.state_dict().items()}


def same_memory(first: Trainer, second: Trainer) -> None:
    one, other = content(first), content(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def recording(trainer: Trainer) -> list[dict]:
    """For each forward pass of a trainer epoch, indices, what was remembered, and what was answered."""
    passes, memory = [], trainer.memory
    recall, note = memory.recall, memory.note

    def recalled(indices, weight, epoch):
        found = recall(indices, weight, epoch)
        passes.append({"epoch": epoch, "indices": indices, "weight": weight, "remembered": found})
        return found

    def noted(indices, weight, answers):
        passes[-1]["answers"] = answers.clone()
        note(indices, weight, answers)

    memory.recall, memory.note = recalled, noted
    return passes


def test_each_image_is_taught_by_its_own_earlier_answers(few, tmp_path):
    """A plain reference: a dict of lists of answers, and the weighted mean of each."""
    trainer = make_trainer(tmp_path, few, make_task(memory_momentum=0.5), epochs=4, val_interval=4)
    passes = recording(trainer)
    trainer.fit()
    answers: dict[int, list[torch.Tensor]] = {}
    for seen in passes:
        for position, index in enumerate(seen["indices"].tolist()):
            before = answers.setdefault(index, [])
            assert bool(seen["remembered"].known[position]) == bool(before)
            if before:
                weights = [0.5 ** (len(before) - k) for k in range(1, len(before) + 1)]
                expected = sum(w * a for w, a in zip(weights, before)) / sum(weights)
                torch.testing.assert_close(seen["remembered"].logits[position], expected, rtol=2e-3, atol=2e-3)
            before.append(seen["answers"][position])
    assert len(passes) == 16
    assert len(answers) > 80
    assert max(map(len, answers.values())) == 4


def test_during_the_warm_up_the_present_ensemble_teaches(few, tmp_path):
    """While the memory is filled; from then on it teaches."""
    runs = {}
    for name, task in (
        ("memory", make_task(memory_warmup_epochs=2)),
        ("ensemble", make_task(teacher="ensemble")),
    ):
        runs[name] = make_trainer(tmp_path / name, few, task, epochs=3, val_interval=3)
        runs[name].fit()
    histories = [run.state.history for run in runs.values()]
    assert histories[0][:2] == histories[1][:2]
    assert histories[0][2] != histories[1][2]
    for epochs in (2, 3):
        with pytest.raises(ValueError, match=f"memory_warmup_epochs .*less than the run's {epochs} epochs, got 3"):
            make_trainer(tmp_path / "never", few, make_task(memory_warmup_epochs=3), epochs=epochs)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"mixup": 0.4, "mixup_prob": 0.5, "model_ema": True, "grad_accum_steps": 2, "smoothing": 0.1},
            marks=pytest.mark.slow,
        ),
        {},
        pytest.param({"amp": True, "amp_dtype": "bfloat16", "aug_repeats": 2.0}, marks=pytest.mark.slow),
    ],
    ids=["mixup, EMA and accumulation", "plain", "bf16 and repeated augmentation"],
)
def test_a_run_stopped_in_the_middle_goes_on_as_if_nothing_had_happened(changes, few, tmp_path, monkeypatch):
    undisturbed = make_trainer(tmp_path / "a", few, batch_size=10, epochs=3, **changes)
    undisturbed.fit()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert (
            make_trainer(tmp_path / "b", few, batch_size=10, epochs=3, **changes).fit().interrupted_by == signal.SIGINT
        )
    resumed = make_trainer(tmp_path / "b", few, batch_size=10, epochs=3, resume="latest", **changes)
    result = resumed.fit()
    same_weights(undisturbed.update.task, resumed.update.task, rtol=0, atol=0)
    same_memory(undisturbed, resumed)
    assert result.history == undisturbed.state.history


@pytest.mark.parametrize("topk", [pytest.param(0, marks=pytest.mark.slow), 3])
@pytest.mark.slow
def test_a_large_memory_is_kept_in_files_and_is_the_same(topk, few, tmp_path, monkeypatch, capsys):
    device = make_trainer(tmp_path / "device", few, make_task(memory_topk=topk))
    device.fit()
    said = capsys.readouterr().out
    assert re.search(rf"answers to 95 images: {'10 classes' if not topk else 'the 3 most likely of 10'}.* MB on", said)
    monkeypatch.setattr(run_memory, "DEVICE_BYTES", 0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        make_trainer(tmp_path / "files", few, make_task(memory_topk=topk)).fit()
    assert not (tmp_path / "files" / FOLDER).exists()
    (tmp_path / "files" / FOLDER / "3").mkdir(parents=True)  # left by a run that was killed
    files = make_trainer(tmp_path / "files", few, make_task(memory_topk=topk), resume="latest")
    seen, finish = [], files._finish_epoch
    files._finish_epoch = lambda: (
        seen.append(sorted(path.name for path in files.output.glob(f"{FOLDER}/*"))),
        finish(),
    )
    files.fit()
    assert seen == [["0"]]
    assert not (tmp_path / "files" / FOLDER).exists()
    assert f"MB per process in {FOLDER}/ of the run directory" in capsys.readouterr().out
    same_weights(device.update.task, files.update.task, rtol=0, atol=0)
    same_memory(device, files)


def test_a_disk_that_is_too_small(few, tmp_path, monkeypatch):
    monkeypatch.setattr(run_memory, "DEVICE_BYTES", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match=rf"answers to the images .* {tmp_path}.* 0 MB free .*--memory-topk"):
        make_trainer(tmp_path, few).fit()
    assert not (tmp_path / FOLDER / "0").exists()
    assert not (tmp_path / "config.yaml").exists()  # so that the corrected command may have the directory


def test_the_checkpoint_holds_it_with_a_checksum(few, tmp_path):
    trainer = make_trainer(tmp_path, few)
    trainer.fit()
    older, newest = list_checkpoints(tmp_path / "checkpoints")
    path = newest / MEMORY_FILE
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=f"{MEMORY_FILE} is damaged; skipped"):
        assert find_checkpoint("latest", str(tmp_path)) == older


@pytest.mark.slow
def test_a_run_is_resumed_with_its_own_teacher_and_images(few, tmp_path):
    make_trainer(tmp_path / "memory", few, epochs=1).fit()
    make_trainer(tmp_path / "ensemble", few, make_task(teacher="ensemble"), epochs=1).fit()
    for name, teacher, message in (
        ("memory", "ensemble", "a memory of answers, but this run has none; resume with the teacher"),
        ("ensemble", "memory", "no memory of answers, but this run has one; resume with the teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / name, few, make_task(teacher=teacher), resume="latest").fit()
    fewer = Subset(few[0], range(80)), few[1]
    with pytest.raises(ValueError, match="memory of answers .*images, classes or topk are others"):
        make_trainer(tmp_path / "memory", fewer, resume="latest").fit()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_the_weights_of_a_mixture_are_timms(mode, cutmix):
    """Images and labels are those of timm's Mixup; with the weights, both can be mixed again."""
    config = TrainConfig(mixup=0.0 if cutmix else 1.0, cutmix=cutmix, mixup_mode=mode, mixup_prob=0.7, smoothing=0.1)
    mixer, labels = TargetMixer(config, 5), torch.tensor([0, 1, 2, 2, 4, 0])
    ones = nn.functional.one_hot(labels, 5).float() * 0.9 + 0.02
    for seed in range(4):
        x = torch.rand(6, 1, 8, 8)
        found = []
        for call in (mixer, mixer.mix):
            torch.manual_seed(seed)
            np.random.seed(seed)
            found.append(call(x.clone(), labels, 0))
        (images, target), (same_images, same_target, weight) = found
        assert torch.equal(images, same_images)
        torch.testing.assert_close(same_target, target)
        torch.testing.assert_close(target, weight[:, None] * ones + (1 - weight[:, None]) * ones.flip(0))
        if not cutmix:
            expected = weight[:, None, None, None] * x + (1 - weight[:, None, None, None]) * x.flip(0)
            torch.testing.assert_close(images, expected)
    assert isinstance(mixer.mixup, Mixup)
    assert (mixer.mixup.num_classes, mixer.mixup.label_smoothing) == (5, 0.1)


def test_memories_are_mixed_as_the_images_and_answers_to_mixtures_are_not_kept(few, tmp_path):
    trainer = make_trainer(tmp_path, few, epochs=1)
    memory = trainer.memory
    memory.open(tmp_path)
    answers = torch.randn(4, 10)
    memory.memory.update(torch.tensor([10, 11, 12]), answers[:3])
    indices, weight = torch.tensor([10, 13, 12, 11]), torch.tensor([0.75, 1.0, 0.5, 0.25])
    logits, known = memory.recall(indices, weight, 0)
    assert known.tolist() == [True, False, False, True]  # what is opposite is known, too; 13 is not known
    torch.testing.assert_close(logits[0], 0.75 * answers[0] + 0.25 * answers[1], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(logits[3], 0.25 * answers[1] + 0.75 * answers[0], rtol=2e-3, atol=2e-3)
    memory.note(indices, weight, answers)
    memory.write()
    assert memory.memory.lookup(torch.arange(95)).known.nonzero().flatten().tolist() == [10, 11, 12, 13]
    assert memory.memory.tensors["counts"][10:14].tolist() == [1, 1, 1, 1]  # 13 alone was not mixed


@pytest.mark.slow
def test_until_mixing_is_off_nothing_is_remembered(few, tmp_path):
    trainer = make_trainer(tmp_path, few, epochs=3, val_interval=3, mixup=0.4, mixup_off_epoch=1)
    passes = recording(trainer)
    trainer.fit()
    known = [[seen["remembered"].known for seen in passes if seen["epoch"] == epoch] for epoch in range(3)]
    assert not torch.cat(known[0] + known[1]).any()
    assert torch.cat(known[2]).sum() > 60


@pytest.mark.parametrize(
    "changes",
    [{"mixup": 0.4}, {"cutmix": 1.0, "mixup_off_epoch": 2}, {"cutmix_minmax": (0.2, 0.8), "mixup_mode": "elem"}],
)
def test_where_all_images_are_always_mixed_it_is_refused(changes, few, tmp_path):
    with pytest.raises(ValueError, match=r"--teacher memory.*mixup_prob 1 \(--mixup-prob\).*\(--mixup-off-epoch\)"):
        make_trainer(tmp_path / "run", few, **changes)
    assert not (tmp_path / "run").exists()


def test_a_stream_is_refused(tmp_path):
    stream = load_images(EMBEDDED, streaming=True).transformed(DATA_CONFIG, no_aug=True)
    with pytest.raises(
        ValueError, match=r"--teacher memory.*index, which streamed images \(--streaming\) .*'ensemble'"
    ):
        make_trainer(tmp_path / "run", stream)
    assert not (tmp_path / "run").exists()


def test_without_labels_it_is_refused(few, tmp_path):
    with pytest.raises(ValueError, match="unlabelled needs .*teacher 'memory' learns from labels"):
        make_trainer(tmp_path, few, make_task(frozen=True), unlabelled=True)


@pytest.mark.slow
def test_an_image_in_anothers_place_has_no_part_in_it(few, tmp_path):
    class Damaged(torch.utils.data.Dataset):
        def __len__(self):
            return 95

        def __getitem__(self, index):
            if index == 7:
                raise OSError("damaged")
            return few[0][index]

    *_, replaced, index = TrainImages(Damaged(), "skip")[Draw(3, 7)]
    assert (replaced, index) == (True, NO_INDEX)
    assert TrainImages(Damaged(), "skip")[Draw(3, 8)][2:] == (False, 8)
    trainer = make_trainer(tmp_path, (Damaged(), few[1]), epochs=3, batch_size=19, on_bad_sample="skip", val_interval=3)
    passes = recording(trainer)
    trainer.fit()
    places = [seen["remembered"].known[seen["indices"] == NO_INDEX] for seen in passes]
    assert [known.tolist() for known in places if len(known)] == [[False]] * 3
    assert trainer.memory.memory.tensors["counts"][:95].tolist() == [3 if index != 7 else 0 for index in range(95)]


@pytest.mark.slow
def test_an_update_that_is_left_out_leaves_no_answers(few, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, few, epochs=1, on_nan="skip")
    clip, calls = Updater._clip, []
    monkeypatch.setattr(Updater, "_clip", lambda self: (calls.append(1), clip(self) and len(calls) != 2)[1])
    passes = recording(trainer)
    trainer.fit()
    known = trainer.memory.memory.lookup(torch.arange(95)).known
    for number, seen in enumerate(passes):
        assert known[seen["indices"]].all() == (number != 1)


def test_an_image_that_a_subset_repeats_has_one_memory(few, tmp_path):
    some = Subset(few[0], [5, 9, 40, 60])
    assert image_numbers(Subset(some, [0, 1, 2, 3] * 3)).tolist() == [0, 1, 2, 3] * 3
    assert image_numbers(Subset(some, [3, 1, 3])).tolist() == [1, 0, 1]
    assert image_numbers(some).tolist() == [0, 1, 2, 3]
    trainer = make_trainer(tmp_path, (Subset(few[0], list(range(40)) * 2), few[1]), epochs=1)
    assert trainer.memory.images == 40
    trainer.fit()
    assert trainer.memory.memory.tensors["counts"].dtype == torch.int32
    assert memory_bytes(40, 10) == 41 * 24


def test_several_views_of_an_image_give_their_mean(fashion, tmp_path):
    data = fashion.transformed(DATA_CONFIG, aug_splits=2)
    task = make_task()
    trainer = make_trainer(tmp_path, data, task, epochs=1, batch_size=4)
    trainer.memory.open(tmp_path)
    passes = recording(trainer)
    batch = next(trainer.batches.batches(0, 0))
    trainer.update([batch], 0, 1, 1)
    (seen,) = passes
    assert torch.equal(seen["indices"], batch[3].repeat(2))
    found = trainer.memory.memory.lookup(batch[3])
    torch.testing.assert_close(found.logits, seen["answers"].view(2, 4, 10).mean(0), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_frozen_backbone_with_and_without_a_cache(few, tmp_path):
    runs = [
        make_trainer(tmp_path / str(cached), few, make_task(frozen=True), cache_features=cached, epochs=2)
        for cached in (False, True)
    ]
    for run in runs:
        run.fit()
    heads = [run.eval_model.heads for run in runs]
    same_weights(*heads, rtol=1e-4, atol=1e-5)
    assert torch.equal(*(content(run)["counts"] for run in runs))


def test_a_trial_of_a_batch_size_needs_no_memory(few, tmp_path):
    trainer = make_trainer(tmp_path, few)
    try_updates(trainer.accelerator, make_task(), trainer.update.mixer, trainer.config, (1, 32, 32), 4)


@pytest.mark.parametrize(
    "launcher", [(), pytest.param(TWO_PROCESSES, marks=pytest.mark.slow)], ids=["forks", "torchrun"]
)
def test_two_processes_share_the_answers_of_both(launcher, tmp_path):
    """In each update both learn from the same memory, of the answers that both gave in the updates before."""
    run_python("tests/training/run_memory.py", tmp_path, processes=2, launcher=launcher)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    memories = [rank["memory"] for rank in ranks]
    assert all(torch.equal(memories[0][name], memories[1][name]) for name in memories[0])
    assert memories[0]["counts"].tolist() == [EPOCHS] * IMAGES
    reference = AnswerMemory(IMAGES, 5)
    for update in range(1, EPOCHS * IMAGES // 20 + 1):
        seen = [one for rank in ranks for one in rank["passes"] if one["update"] == update]
        assert len(seen) == 4  # two accumulated batches on each process
        for one in seen:
            expected = reference.lookup(one["indices"])
            assert all(torch.equal(*pair) for pair in zip(expected, one["remembered"]))
        reference.update(*(torch.cat([one[name] for one in seen]) for name in ("indices", "answers")))
    assert torch.equal(reference.state_dict()["answers"], memories[0]["answers"])


@pytest.mark.slow
def test_it_learns(fashion_tensors, tmp_path):
    result, _ = fit(tmp_path, fashion_tensors, make_task(), epochs=4)
    assert result.summary["exits"][3]["top1"] > 30  # chance is 10 %
