"""What calibration finds is never worse than one exit for all images."""

from itertools import product

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from timm_selfdistill import EarlyExit
from timm_selfdistill.inference import calibration, early_exit
from timm_selfdistill.inference.calibration import (
    Answers,
    choose_point,
    find_better_exit,
    is_met,
    macs_of_exits,
    sign_test,
)
from timm_selfdistill.inference.policy import POLICIES
from timm_selfdistill.inference.thresholds import (
    EVERYBODY,
    ExitCosts,
    OperatingPoint,
    find_curve,
    fixed_exits,
    simulate,
)

from ..conftest import small_model

COSTS = ExitCosts(stages=[10.0, 20.0, 40.0], heads=[1.0, 2.0], stops=[0, 1])
NOISY = ExitCosts(stages=[0.62, 0.55, 1.0], heads=[0.02, 0.03], stops=[0, 1])
"""Measured times, by which the first exit takes longer than the second."""
LATE = ExitCosts(stages=[10.0, 20.0, 40.0], heads=[1.0, 2.0], stops=[1, 2])
TWO = ExitCosts(stages=[10.0, 40.0], heads=[1.0], stops=[0])
SHARES = {
    "better with depth": (0.70, 0.80, 0.90),
    "all equal": (0.80, 0.80, 0.80),
    "worse with depth": (0.85, 0.80, 0.75),
    "best in the middle": (0.70, 0.90, 0.80),
    "second hardly better": (0.709, 0.719, 0.74),
    "always right": (1.0, 1.0, 1.0),
    "never right": (0.0, 0.0, 0.0),
    "two exits": (0.75, 0.80),
}


def draw(kind: str, seed: int, count: int = 120, classes: int = 5, policy: str = "confidence") -> Answers:
    """Random logits of exits that are right as often as `SHARES` says, surer where the image is easy."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    easy = torch.rand(count, generator=generator)
    logits = []
    for share in SHARES[kind]:
        right = torch.rand(count, generator=generator) < share + (share * (1 - share)) * (2 * easy - 1)
        said = torch.where(right, labels, (labels + 1) % classes)
        height = 1 + 3 * easy + torch.rand(count, generator=generator)
        logits.append(torch.nn.functional.one_hot(said, classes) * height[:, None])
    return Answers.of(logits, labels, torch.arange(count), [1.0] * len(logits), policy)


def measure(point: OperatingPoint, data: Answers, costs: ExitCosts) -> OperatingPoint:
    exits, cost = simulate(data.confidence, point.thresholds, costs)
    accuracy = data.right.gather(0, exits[None]).double().mean()
    return OperatingPoint(point.thresholds, float(accuracy), float(cost.mean()))


def check_no_worse(data: Answers, costs: ExitCosts, curve: list[OperatingPoint], budget: dict[str, float]) -> None:
    found = measure(choose_point(curve, data, costs, budget), data, costs)
    tiny, plain = 1e-9, data.plain_accuracy
    kept = [
        fixed
        for fixed in fixed_exits(data.right, costs)
        if is_met(calibration._pessimistic(fixed, data, costs), plain, costs, budget)
    ]
    if kept:
        assert is_met(found, plain, costs, budget)
    if "max_accuracy_drop" in budget:
        assert kept
        assert all(found.cost <= fixed.cost + tiny for fixed in kept)
    else:
        assert all(found.accuracy >= fixed.accuracy - tiny for fixed in kept)
    for fixed in fixed_exits(data.right, costs):
        if fixed.cost <= found.cost + tiny:
            assert fixed.accuracy <= found.accuracy + tiny
        if fixed.accuracy >= found.accuracy - tiny:
            assert fixed.cost >= found.cost - tiny


@pytest.mark.parametrize("kind", SHARES)
def test_no_fixed_exit_is_better_on_the_images_that_thresholds_are_found_on(kind):
    kinds = [TWO] if kind == "two exits" else [COSTS, NOISY, LATE]
    for seed, (policy, costs) in enumerate(product(POLICIES, kinds)):
        data = draw(kind, seed, policy=policy)
        curve = find_curve(data.confidence, data.right, costs)
        budgets = [{"max_accuracy_drop": drop} for drop in (0.0, 1.0, 5.0, 30.0)]
        budgets += [{"min_speedup": speedup} for speedup in (1.0, 1.5, 1.7, 2.5, 100.0)]
        budgets += [{"max_macs": fixed.cost * share} for fixed in fixed_exits(data.right, costs) for share in (1, 1.1)]
        for budget in budgets:
            check_no_worse(data, costs, curve, budget)


def test_a_fixed_exit_costs_what_its_stages_and_its_head_cost():
    right = torch.tensor([[True, False], [True, True], [False, False]])
    assert fixed_exits(right, COSTS) == [
        ([EVERYBODY, None], 0.5, 11.0),
        ([None, EVERYBODY], 1.0, 22.0),
        ([None, None], 0.0, 40.0),
    ]


def test_the_second_exit_is_found_where_it_alone_keeps_a_speed_up():
    """Its head runs without that of the first; a mixture of the two costs more than the second by itself."""
    data = draw("best in the middle", 0)
    point = choose_point(find_curve(data.confidence, data.right, COSTS), data, COSTS, {"max_macs": 22.0})
    assert point.accuracy >= float(data.right[1].double().mean())
    data.confidence[:] = torch.rand(data.confidence.shape).double()  # which say nothing
    data.right[0] = False
    assert choose_point(find_curve(data.confidence, data.right, COSTS), data, COSTS, {"max_macs": 22.0}).thresholds == [
        None,
        EVERYBODY,
    ]


@pytest.mark.parametrize(
    ("wins", "losses", "expected"), [(0, 0, 1.0), (1, 0, 0.5), (5, 0, 1 / 32), (2, 2, 11 / 16), (0, 3, 1.0)]
)
def test_the_sign_test_counts_the_images_that_one_of_the_two_has_right(wins, losses, expected):
    first = torch.tensor([True] * wins + [False] * losses + [True] * 4)
    second = torch.tensor([False] * wins + [True] * losses + [True] * 4)
    assert sign_test(first, second) == pytest.approx(expected)


def test_the_sign_test_of_many_images():
    first = torch.arange(40_000) % 2 == 0
    assert sign_test(first, ~first) == pytest.approx(0.5, abs=0.01)
    assert sign_test(first | (torch.arange(40_000) < 2000), ~first) < 1e-3


def test_a_fixed_exit_that_is_better_on_other_images_is_said():
    data = draw("better with depth", 0, count=400)
    first, second, plain = (measure(fixed, data, COSTS) for fixed in fixed_exits(data.right, COSTS))
    assert find_better_exit(first, data, COSTS, {"max_macs": 25.0}) == 1
    assert find_better_exit(first, data, COSTS, {"max_macs": 45.0}) == 2
    assert find_better_exit(first, data, COSTS, {"max_macs": 15.0}) is None
    assert find_better_exit(second, data, COSTS, {"max_macs": 25.0}) is None
    assert find_better_exit(plain, data, COSTS, {"max_macs": 25.0}) == 1  # which keeps the budget
    assert find_better_exit(plain, data, COSTS, {"max_accuracy_drop": 1.0}) is None
    assert find_better_exit(plain, data, COSTS, {"max_accuracy_drop": 40.0}) == 0
    assert find_better_exit(first, data, COSTS, {"max_accuracy_drop": 5.0}) is None


def test_chance_alone_makes_no_fixed_exit_better():
    """Everyone at the first of three exits, of which none is better than another."""
    said = 0
    for seed in range(400):
        data = draw("all equal", seed)
        found = measure(fixed_exits(data.right, COSTS)[0], data, COSTS)
        said += find_better_exit(found, data, COSTS, {"max_macs": 45.0}) is not None
    assert said <= 0.05 * 400


def images(count: int = 450) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    return DataLoader(TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), labels), 150)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exit", "policy"), [(0, "confidence"), (0, "entropy"), (1, "margin"), (2, "entropy"), (3, "margin")]
)
def test_a_budget_that_an_exit_just_keeps(exit, policy, monkeypatch):
    """Of a network whose exits are equally good, by multiply-adds and by time."""
    monkeypatch.setattr(
        early_exit, "times_of_exits", lambda model, stops, x: macs_of_exits(model, stops, tuple(x.shape[1:]))
    )
    torch.manual_seed(exit)
    model = small_model().eval()
    macs = model.summary((3, 32, 32))[exit].macs
    plain = model.summary((3, 32, 32)).plain.macs
    part = torch.randperm(450, generator=torch.Generator().manual_seed(0)).tensor_split(3)[1]
    x, y = (tensor[part] for tensor in images().dataset.tensors)
    with torch.no_grad():
        fixed = [float((logits.argmax(1) == y).double().mean()) for logits in model.forward_exits(x).logits]
    for budget in ({"max_macs": macs}, {"min_speedup": plain / macs}):
        found = EarlyExit(model, policy=policy)
        report = found.calibrate(images(), **budget)
        assert report.met
        assert report.macs <= macs * (1 + 1e-9)
        answers = found.predict(x).logits.argmax(1)
        assert float((answers == y).double().mean()) >= max(fixed[: exit + 1])
        if exit == 0:
            assert report.fixed_exit == 0
            assert report.thresholds[1:] == [None, None]
