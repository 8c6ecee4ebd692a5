"""A memory of what was answered to each image, and the loss that it teaches in."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from timm_selfdistill import AnswerMemory, Remembered, SelfDistillLoss, SelfDistillOutput, SelfDistillTask
from timm_selfdistill.memory import kept_classes, memory_bytes

from .conftest import small_model
from .test_loss import BATCH, CLASSES, random_output, softmax

FLOAT16 = {"rtol": 1e-3, "atol": 2e-3}
"""What is lost by keeping the answers in half precision."""


def remembered(logits: torch.Tensor, known: list[int] | None = None) -> Remembered:
    return Remembered(logits, torch.tensor(known or [1] * len(logits), dtype=torch.bool))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.6, 0.99])
def test_the_memory_is_the_mean_of_all_answers_weighted_by_momentum(momentum):
    memory, answers = AnswerMemory(6, CLASSES, momentum), 5 * torch.randn(9, CLASSES)
    for number, answer in enumerate(answers, 1):
        memory.update(torch.tensor([4]), answer[None])
        weights = momentum ** np.arange(number - 1, -1, -1)
        expected = (weights[:, None] * answers[:number].double().numpy()).sum(0) / weights.sum()
        logits, known = memory.lookup(torch.tensor([4, 3]))
        assert known.tolist() == [True, False]
        np.testing.assert_allclose(logits[0], expected, **FLOAT16)
        assert not logits[1].any()


def test_an_image_that_comes_several_times_in_an_update_gives_one_answer():
    memory, answers = AnswerMemory(3, CLASSES), torch.randn(4, CLASSES)
    for _ in range(2):
        memory.update(torch.tensor([2, 0, 2, 2]), answers)
    logits, known = memory.lookup(torch.arange(3))
    assert known.tolist() == [True, False, True]
    torch.testing.assert_close(logits[0], answers[1], **FLOAT16)
    torch.testing.assert_close(logits[2], answers[[0, 2, 3]].mean(0), **FLOAT16)
    assert memory.tensors["counts"][:3].tolist() == [2, 0, 2]


def test_no_image_is_neither_read_nor_written():
    memory = AnswerMemory(3, CLASSES)
    memory.update(torch.tensor([-1, 1, -1]), torch.randn(3, CLASSES))
    logits, known = memory.lookup(torch.tensor([-1, 0, 1, 2]))
    assert known.tolist() == [False, False, True, False]
    assert not logits[[0, 1, 3]].any()
    assert {len(tensor) for tensor in memory.state_dict().values()} == {3}


def test_answers_of_any_size_stay_finite():
    memory = AnswerMemory(1, 3)
    memory.update(torch.tensor([0]), torch.tensor([[1e30, 0.0, -1e30]]))
    assert memory.lookup(torch.tensor([0])).logits.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_of_many_classes_the_largest_are_kept_and_the_rest_of_the_probability_is_even(temperature):
    memory, answers = AnswerMemory(5, 40, topk=6, temperature=temperature), 3 * torch.randn(2, 40)
    memory.update(torch.tensor([3, 1]), answers)
    p = (memory.lookup(torch.tensor([3, 1])).logits / temperature).softmax(1)
    expected = (answers / temperature).softmax(1)
    top = expected.topk(6).indices
    torch.testing.assert_close(p.gather(1, top), expected.gather(1, top), **FLOAT16)
    others = p.scatter(1, top, torch.nan)
    for row in others:
        assert len(set(row[~row.isnan()].tolist())) == 1
    torch.testing.assert_close(others.nansum(1), 1 - expected.gather(1, top).sum(1), **FLOAT16)
    memory.update(torch.tensor([1]), answers[1:])  # the running mean of the same stays the same
    torch.testing.assert_close(
        memory.lookup(torch.tensor([1])).logits[0].topk(6).values, answers[1].topk(6).values, **FLOAT16
    )


@pytest.mark.parametrize(
    ("classes", "topk", "kept"),
    [(200, None, 200), (201, None, 50), (1000, 0, 1000), (1000, 10, 10), (10, 50, 10)],
)
def test_how_many_classes_are_kept(classes, topk, kept):
    assert kept_classes(classes, topk) == kept == AnswerMemory(2, classes, topk=topk).kept


def test_the_size_of_imagenets_memory():
    images = 1_281_167
    assert memory_bytes(images, 1000, 0) == pytest.approx(2.57e9, rel=0.01)
    assert memory_bytes(images, 1000) == pytest.approx(264e6, rel=0.01)
    assert AnswerMemory(10, 1000).bytes == memory_bytes(10, 1000)


@pytest.mark.parametrize("topk", [0, 3])
def test_a_memory_in_files_is_equal_and_moves_to_another_one(topk, tmp_path):
    memories = AnswerMemory(8, CLASSES, topk=topk), AnswerMemory(8, CLASSES, topk=topk, folder=tmp_path / "files")
    for _ in range(3):
        indices, answers = torch.randint(8, (6,)), torch.randn(6, CLASSES)
        for memory in memories:
            memory.update(indices, answers)
    assert {path.name for path in (tmp_path / "files").iterdir()} == {f"{name}.bin" for name in memories[0].tensors}
    other = AnswerMemory(8, CLASSES, topk=topk)
    other.load_state_dict({name: tensor.clone() for name, tensor in memories[1].state_dict().items()})
    for found in (memories[1], other):
        for name, tensor in memories[0].state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(OSError, match=rf"answers .*2 MB, .*{tmp_path} .*1 MB free .*topk, --memory-topk"):
        AnswerMemory(10_000, 100, folder=tmp_path / "files")
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda memory: memory.lookup(torch.tensor([0, 5])), r"0\.\.4, or be -1 for none, got 5"),
        (lambda memory: memory.lookup(torch.tensor([-2])), r"0\.\.4, or be -1 for none, got -2"),
        (lambda memory: memory.update(torch.tensor([0, 1]), torch.zeros(2, 6)), r"logits \(2, 7\) .*got \(2, 6\)"),
        (lambda memory: memory.load_state_dict(AnswerMemory(6, 7).state_dict()), "images, classes or topk are others"),
        (lambda memory: AnswerMemory(5, 7, momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
        (lambda memory: AnswerMemory(5, 7, topk=-1), "topk must be a number of classes, .*got -1"),
        (lambda memory: AnswerMemory(0, 7), "got 0 images of 7 classes"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(AnswerMemory(5, CLASSES))


def test_the_loss_makes_a_memory_of_its_own_settings():
    memory = SelfDistillLoss(temperature=2.0, memory_momentum=0.3, memory_topk=4).create_memory(5, 9)
    assert (memory.momentum, memory.kept, memory.temperature) == (0.3, 4, 2.0)
    default, same = SelfDistillLoss().create_memory(5, 9), AnswerMemory(5, 9)
    assert vars(default).keys() == vars(same).keys()
    assert (default.momentum, default.temperature) == (same.momentum, same.temperature)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_teacher_is_memory_and_present_ensemble(share):
    """The equation, written down in float64 numpy, image by image."""
    output, memory = random_output(), torch.randn(BATCH, CLASSES)
    known = [1, 0, 1, 1, 0]
    loss = SelfDistillLoss(2.0, 0.4, teacher="memory", memory_share=share)
    got = loss.terms(output, torch.arange(BATCH), remembered(memory, known))
    logits = [z.double().numpy() for z in output.logits]
    expected = 0.0
    for image in range(BATCH):
        weight = share * known[image]
        teacher = (1 - weight) * np.mean(logits, 0)[image] + weight * memory[image].double().numpy()
        p = softmax(teacher[None] / 2.0)
        expected += sum((p * (np.log(p) - np.log(softmax(z[image][None] / 2.0)))).sum() for z in logits) / BATCH
    assert got["distill"].item() == pytest.approx(4 * expected, rel=1e-5)
    assert got["loss"].item() == pytest.approx(got["label"].item() + 0.4 * 4 * expected, rel=1e-5)
    plain = SelfDistillLoss(2.0, 0.4).terms(output, torch.arange(BATCH))
    assert torch.equal(got["label"], plain["label"])
    if not share:
        assert torch.equal(got["distill"], plain["distill"])


def test_where_nothing_is_remembered_the_present_ensemble_teaches():
    output = random_output()
    nothing = remembered(torch.zeros(BATCH, CLASSES), [0] * BATCH)
    got = SelfDistillLoss(teacher="memory").terms(output, torch.arange(BATCH), nothing)
    for name, value in SelfDistillLoss().terms(output, torch.arange(BATCH)).items():
        assert torch.equal(got[name], value), name


def test_the_gradient_of_ps_kd():
    """arXiv:2006.12000: cross entropy with (1 - alpha) y + alpha p, p what one classifier said in the epoch before."""
    z, before = torch.randn(BATCH, CLASSES, requires_grad=True), torch.randn(BATCH, CLASSES)
    target = torch.arange(BATCH)
    loss = SelfDistillLoss(temperature=1.0, alpha=0.8, teacher="memory", memory_momentum=0.0)
    memory = loss.create_memory(BATCH, CLASSES)
    for answer in (torch.randn(BATCH, CLASSES), before):
        memory.update(target, answer)
    loss(SelfDistillOutput((z,), (torch.zeros(BATCH, 1, 1, 1),)), target, memory.lookup(target)).backward()
    soft = 0.2 * nn.functional.one_hot(target, CLASSES) + 0.8 * before.softmax(1)
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(z, soft), z)
    torch.testing.assert_close(z.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("distill", ["softmax", "sigmoid"])
def test_what_the_memory_takes_teaches_as_the_ensemble_that_said_it(distill):
    """Its mean over the classes is subtracted where it has no effect."""
    output = random_output()
    output = output._replace(logits=tuple(z + 5 for z in output.logits))
    loss = SelfDistillLoss(teacher="memory", distill=distill)
    answer = loss.answer(output)
    assert answer.dtype == torch.float32
    assert bool((answer.mean(1).abs() < 1e-5).all()) == (distill == "softmax")
    got = loss.terms(output, None, remembered(answer))["distill"]
    torch.testing.assert_close(got, SelfDistillLoss(distill=distill).terms(output)["distill"])


@pytest.mark.parametrize("logit", [1e30, 3e38])
def test_finite_beside_any_finite_logits(logit):
    logits = tuple((logit * torch.eye(CLASSES)[:BATCH].roll(i, 1)).requires_grad_() for i in range(3))
    output = SelfDistillOutput(logits, (torch.ones(BATCH, 2, 1, 1),) * 3)
    loss = SelfDistillLoss(teacher="memory", memory_share=0.5)
    value = loss(output, torch.arange(BATCH), remembered(torch.randn(BATCH, CLASSES)))
    value.backward()
    assert value.isfinite()
    assert all(z.grad.isfinite().all() for z in logits)
    assert loss.answer(output).isfinite().all()


def test_the_memory_gets_no_gradient_and_all_classifiers_do():
    output = random_output(requires_grad=True)
    memory = torch.randn(BATCH, CLASSES, requires_grad=True)
    SelfDistillLoss(teacher="memory", memory_share=0.5).terms(output, None, remembered(memory))["distill"].backward()
    assert memory.grad is None
    assert all(z.grad.abs().sum() > 0 for z in output.logits)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"memory_momentum": 1.0}, r"memory_momentum must lie in \[0, 1\), got 1.0"),
        ({"memory_momentum": math.nan}, r"memory_momentum must lie in \[0, 1\), got nan"),
        ({"memory_share": 1.5}, r"memory_share must lie in \[0, 1\], got 1.5"),
        ({"memory_warmup_epochs": -1}, "memory_warmup_epochs must be a number of epochs, got -1"),
        ({"memory_topk": 0.5}, "memory_topk must be a number of classes, .*got 0.5"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillLoss(teacher="memory", **setting)


def test_a_task_says_what_the_memory_takes_and_learns_from_it():
    task = SelfDistillTask(small_model(), SelfDistillLoss(teacher="memory")).train()
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    result = task(x, y, remembered(torch.randn(2, 10)))
    assert set(result) == {"loss", "output", "label_loss", "distill_loss", "hint_loss", "answer"}
    with torch.no_grad():
        expected = torch.stack(task.model.train()(x).logits).mean(0)
    torch.testing.assert_close(result["answer"], expected - expected.mean(1, keepdim=True))
    assert not result["answer"].requires_grad
    result["loss"].backward()
    assert all(p.grad is not None for p in task.parameters())


def test_training_without_what_is_remembered_is_refused():
    task = SelfDistillTask(small_model(), SelfDistillLoss(teacher="memory")).train()
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"remembered=memory\.lookup\(indices\), .*timm's train\.py, needs teacher="):
        task(x, y)
    result = task.eval()(x, y)
    torch.testing.assert_close(result["loss"], SelfDistillTask(task.model).eval()(x, y)["loss"])
    nothing = remembered(torch.zeros(2, 10), [0, 0])
    with pytest.raises(ValueError, match="remembered is for the teacher 'memory', and the teacher is 'ensemble'"):
        SelfDistillTask(task.model).train()(x, y, nothing)
    with pytest.raises(ValueError, match=r"expected remembered logits \(2, 10\) and known \(2,\), got \(3, 10\)"):
        task.train()(x, y, remembered(torch.zeros(3, 10)))


@pytest.mark.slow
def test_captured_exits_learn_from_it_too():
    task = SelfDistillTask(small_model(), SelfDistillLoss(teacher="memory")).train()
    x, y, memory = torch.randn(4, 3, 64, 64), torch.arange(4), remembered(torch.randn(4, 10), [1, 0, 1, 1])
    expected = task(x, y, memory)
    task.capture_exits(batch_size=4, backend="aot_eager", mode=None)
    found = task(x, y, memory)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
