"""Temperatures, thresholds and promises, on answers whose truth is known."""

import json
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from timm_selfdistill import EarlyExit, SelfDistillModel, SelfDistillTask, TrainConfig, Trainer
from timm_selfdistill.inference import early_exit
from timm_selfdistill.inference.calibration import (
    Answers,
    calibration_error,
    choose_point,
    fit_temperature,
    is_met,
    macs_of_exits,
)
from timm_selfdistill.inference.calibration_report import FixedExit
from timm_selfdistill.inference.policy import POLICIES
from timm_selfdistill.inference.thresholds import EVERYBODY, ExitCosts, OperatingPoint, find_curve, simulate

from ..conftest import small_model

COSTS = ExitCosts(stages=[10.0, 20.0, 40.0], heads=[1.0, 2.0], stops=[0, 1])


def test_the_temperature_is_the_one_that_the_labels_were_drawn_with():
    logits = torch.randn(20_000, 10) * 2
    for temperature in (0.5, 1.0, 3.0):
        labels = torch.distributions.Categorical(logits=logits / temperature).sample()
        assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_stays_within_bounds_where_every_answer_is_right():
    logits = torch.eye(10).repeat(10, 1) * 3
    assert fit_temperature(logits, torch.arange(100) % 10) == pytest.approx(0.25, rel=1e-3)
    assert fit_temperature(logits, (torch.arange(100) + 1) % 10) == pytest.approx(4, rel=1e-3)


def test_no_other_temperature_makes_the_labels_likelier():
    logits = torch.randn(500, 5) * 3
    labels = torch.distributions.Categorical(logits=logits / 2).sample()
    best = fit_temperature(logits, labels)
    loss = torch.nn.functional.cross_entropy
    assert all(loss(logits / best, labels) <= loss(logits / (best * factor), labels) + 1e-6 for factor in (0.9, 1.1))


def test_the_calibration_error_is_that_of_the_definition():
    probabilities = torch.softmax(torch.randn(300, 4) * 2, 1)
    labels = torch.randint(4, (300,))
    confidence, answer = (part.numpy() for part in probabilities.max(1))
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - (answer == labels.numpy())[inside].mean())
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)


def test_an_image_pays_for_its_stages_and_the_heads_on_its_way():
    confidence = torch.tensor([[0.9, 0.1, 0.1], [0.0, 0.8, 0.2]])
    exits, cost = simulate(confidence, [0.5, 0.5], COSTS)
    assert exits.tolist() == [0, 1, 2]
    assert cost.tolist() == [11.0, 23.0, 43.0]
    assert simulate(confidence, [0.5, None], COSTS)[1].tolist() == [11.0, 41.0, 41.0]
    later = ExitCosts(COSTS.stages, COSTS.heads, stops=[1, 2])  # rows leave the batch one exit later
    assert simulate(confidence, [0.5, 0.5], later)[1].tolist() == [23.0, 43.0, 43.0]


def test_the_curve_is_no_worse_than_any_pair_of_thresholds():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(2, 120, generator=generator).double()
    right = torch.stack(
        [
            torch.rand(120, generator=generator) < sure
            for sure in (0.4 + 0.6 * confidence[0], 0.5 + 0.5 * confidence[1], torch.full((120,), 0.9))
        ]
    )
    curve = find_curve(confidence, right, COSTS)
    assert [point.cost for point in curve] == sorted(point.cost for point in curve)
    assert [point.accuracy for point in curve] == sorted(point.accuracy for point in curve)
    grid = [None, *torch.linspace(0, 1, 25).tolist()]
    grid_points = [(simulate(confidence, [first, second], COSTS)) for first in grid for second in grid]
    for budget in (15.0, 20.0, 25.0, 30.0, 35.0):
        best = max(
            float(right.gather(0, exits[None]).double().mean()) for exits, cost in grid_points if cost.mean() <= budget
        )
        assert max(point.accuracy for point in curve if point.cost <= budget) >= best - 0.04
    for weight in (0.003, 0.01, 0.03):
        reached = max(point.accuracy - weight * point.cost for point in curve)
        for first in grid:
            for second in grid:
                exits, cost = simulate(confidence, [first, second], COSTS)
                accuracy = float(right.gather(0, exits[None]).double().mean())
                assert accuracy - weight * float(cost.mean()) <= reached + 0.01


def synthetic(seed: int, count: int) -> Answers:
    """Of three exits that are right in 85, 90 and 93 of a hundred cases, and more often where they are surer."""
    generator = torch.Generator().manual_seed(seed)
    hard = torch.rand(count, generator=generator).double()
    noise = torch.rand(3, count, generator=generator)
    right = torch.stack([noise[exit] > 2 * share * hard for exit, share in enumerate((0.15, 0.10, 0.07))])
    confidence = (1 - hard) + 0.1 * torch.randn(2, count, generator=generator)
    return Answers(confidence.double(), right)


@pytest.mark.parametrize(
    ("budget", "count", "least"),
    [
        ({"max_accuracy_drop": 1.0}, 1000, 26),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ({"max_macs": 11.0}, 300, 40),
                ({"max_macs": 25.0}, 300, 36),
                ({"min_speedup": 3.6}, 300, 40),
                ({"max_accuracy_drop": 1.0}, 5000, 30),
            )
        ),
    ],
)
def test_a_promise_that_can_be_kept_is_mostly_kept_on_other_images(budget, count, least):
    kept = []
    for seed in range(40):
        found, other = synthetic(seed, count), synthetic(seed + 1000, count)
        point = choose_point(find_curve(found.confidence, found.right, COSTS), found, COSTS, budget)
        exits, cost = simulate(other.confidence, point.thresholds, COSTS)
        accuracy = float(other.right.gather(0, exits[None]).double().mean())
        reached = OperatingPoint(point.thresholds, accuracy, float(cost.mean()))
        kept.append(is_met(reached, other.plain_accuracy, COSTS, budget))
    assert sum(kept) >= least


def test_what_everybody_and_nobody_mean_for_each_policy():
    assert [POLICIES["confidence"].to_threshold(value, 10) for value in (None, EVERYBODY, 0.5)] == [None, 0.0, 0.5]
    assert [POLICIES["entropy"].to_threshold(value, 10) for value in (None, -0.5)] == [None, 0.5]
    uniform = torch.full((4, 10), 0.1)
    assert POLICIES["entropy"].leaves(uniform, POLICIES["entropy"].to_threshold(EVERYBODY, 10)).all()


def loader(count: int = 600, classes: int = 10, noise: float = 1.0) -> DataLoader:
    """Images with a bright square where their class is."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = noise * torch.randn(count, 3, 32, 32, generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, 3 * label : 3 * label + 3] += 1 + 2 * (row % 3)  # some are easy
    return DataLoader(TensorDataset(images, labels), 100)


@pytest.fixture(scope="module")
def trained() -> SelfDistillModel:
    torch.manual_seed(0)
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(2):
        for x, y in loader(900):
            loss = sum(torch.nn.functional.cross_entropy(logits, y) for logits in model(x).logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin"])
def test_a_report_says_what_predict_does(policy, trained):
    early_exit = EarlyExit(trained, policy=policy)
    report = early_exit.calibrate(loader(), max_accuracy_drop=2.0)
    data = loader()
    part = torch.randperm(600, generator=torch.Generator().manual_seed(0)).tensor_split(3)[2]
    x, y = (tensor[part] for tensor in data.dataset.tensors)
    found = early_exit.predict(x)
    assert report.images == [200, 200, 200]
    assert report.accuracy == pytest.approx(100 * float((found.logits.argmax(1) == y).double().mean()))
    assert report.plain_accuracy == pytest.approx(100 * float((trained(x).argmax(1) == y).double().mean()))
    assert report.shares == pytest.approx((torch.bincount(found.exit, minlength=4) / 200).tolist())
    rows = trained.summary((3, 32, 32))
    used = [threshold is not None for threshold in report.thresholds]
    heads = [sum(row.head_macs for row, use in zip(rows, used[: exit + 1]) if use) for exit in range(4)]
    each = [row.macs - row.head_macs + head for row, head in zip(rows, heads)]
    assert report.macs == pytest.approx(sum(share * macs for share, macs in zip(report.shares, each)))
    assert report.plain_macs == rows.plain.macs
    assert report.met == (report.plain_accuracy - report.accuracy <= 2.0)
    assert report.met
    assert report.macs < report.plain_macs


@pytest.mark.parametrize("budget", ["max_macs", "min_speedup"])
def test_budgets_of_cost(budget, trained, monkeypatch):
    def quiet(model, stops, x):  # the times of a machine that nothing else uses
        return macs_of_exits(model, stops, tuple(x.shape[1:]))

    monkeypatch.setattr(early_exit, "times_of_exits", quiet)
    plain = trained.summary((3, 32, 32)).plain.macs
    values = {"max_macs": [0.9 * plain, 0.8 * plain, 1.0], "min_speedup": [1.0, 1.1, 1000.0]}[budget]
    reports = [EarlyExit(trained).calibrate(loader(), **{budget: value}) for value in values]
    if budget == "max_macs":
        assert [report.macs <= value for report, value in zip(reports, values)] == [True, True, False]
    else:
        assert reports[1].speedup >= 1.1
    assert reports[0].met
    assert not reports[2].met
    assert reports[2].macs <= reports[0].macs  # the nearest that there is
    assert f"{budget} {values[2]:g}: NOT MET" in text(reports[2])


def text(report) -> str:
    out = StringIO()
    Console(file=out, width=120).print(report)
    return out.getvalue()


def test_a_report_names_the_fixed_exit_that_it_amounts_to_and_a_better_one(trained):
    report = EarlyExit(trained).calibrate(loader(), max_macs=trained.summary((3, 32, 32))[0].macs)
    assert report.fixed_exit == 0
    assert "all images leave at exit 0" in text(report)
    assert "better" not in text(report)
    report.shares = [0.0, 0.0, 0.0, 1.0]
    assert "no image leaves early: this is the plain network" in text(report)
    report.shares, report.better_exit = [0.5, 0.5, 0.0, 0.0], FixedExit(1, 71.9, 0.5 * report.plain_macs, 1.62)
    assert "leave at" not in text(report)
    assert "exit 1 for all images is better: top-1 71.90 %" in text(report)
    assert "50.0% of the plain network's; 1.62x as fast" in text(report)


def test_it_is_saved_with_the_model_and_printed(trained, tmp_path):
    early_exit = EarlyExit(trained, policy="margin")
    report = early_exit.calibrate(loader(), max_accuracy_drop=1.0)
    trained.save_pretrained(tmp_path, check=False)
    saved = json.loads((tmp_path / "config.json").read_text())["self_distill"]["early_exit"]
    assert saved == report.to_dict()
    card = (tmp_path / "README.md").read_text()
    assert f"top-1 {report.accuracy:.2f} % at {report.macs / report.plain_macs:.0%} of the multiply-adds" in card
    assert "EarlyExit(model).predict(images)" in card
    loaded = EarlyExit(SelfDistillModel.from_pretrained(tmp_path))
    assert (loaded.policy, loaded.thresholds, loaded.temperatures) == ("margin", report.thresholds, report.temperatures)
    x = torch.randn(5, 3, 32, 32)
    assert all(map(torch.equal, loaded.predict(x), early_exit.predict(x)))
    assert EarlyExit(trained, policy="entropy").thresholds is None
    for part in ("max_accuracy_drop 1: met on 200 images", "top-1", "multiply-adds", "ECE after"):
        assert part in text(report)


def test_a_promise_that_is_not_kept_changes_nothing(trained):
    trained.early_exit = None
    early_exit = EarlyExit(trained)
    assert not early_exit.calibrate(loader(), max_macs=1.0).met
    assert early_exit.thresholds is None
    assert trained.early_exit is None


@pytest.mark.parametrize(
    ("name", "stops"),
    [("test_resnet", [0, 1, 2]), ("efficientvim_m1", [0, 2]), pytest.param("coat_tiny", [1], marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:.*images cannot leave")
def test_the_cost_of_who_cannot_leave_is_that_of_going_on(name, stops):
    model = small_model(name).eval()
    x = torch.zeros(1, *model.backbone.pretrained_cfg["input_size"])
    costs = EarlyExit(model).find_costs("macs", x)
    assert costs.stops == stops
    assert costs.plain == model.summary().plain.macs


def test_training_makes_thresholds_void(trained, tmp_path):
    trained.early_exit = {"policy": "confidence", "thresholds": [0.5] * 3}
    data = loader(300).dataset
    Trainer(SelfDistillTask(trained), data, data, TrainConfig(output=str(tmp_path), epochs=1, workers=0))
    assert trained.early_exit is None
    trained.eval()
    assert "early_exit" not in trained.settings()


def test_logits_that_are_no_numbers_are_refused():
    model = small_model().eval()
    torch.nn.init.constant_(model.backbone.fc.bias, float("nan"))
    with pytest.raises(ValueError, match="logits .*no finite numbers"):
        EarlyExit(model).calibrate(loader(), max_accuracy_drop=1.0)


@pytest.mark.parametrize(
    ("early_exit", "message"),
    [
        (5, "early_exit .*got 5"),
        ([1], r"early_exit .*got \[1\]"),
        ({"thresholds": [0.5]}, r"3 thresholds, .*got \[0.5\]"),
        ({"thresholds": ["a", "b", "c"]}, "threshold .*got 'a'"),
        ({"policy": "os.system", "thresholds": [0.5] * 3}, "policy .*got 'os.system'"),
        ({"thresholds": [0.5] * 3, "temperatures": [0] * 4}, "temperature .*got 0"),
    ],
)
def test_a_damaged_record_is_refused(early_exit, message, tmp_path):
    small_model().save_pretrained(tmp_path, check=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["self_distill"]["early_exit"] = early_exit
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        EarlyExit(SelfDistillModel.from_pretrained(tmp_path))


def labelled(labels: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(len(labels), 3, 32, 32), labels), 100)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (loader(299), "calibration .*300 images, got 299"),
        (labelled(torch.zeros(300, dtype=torch.long)), "all 300 images .*class 0; calibration .*two"),
        (labelled(torch.arange(300) % 11), "labels .*0 to 9, got 0 to 10"),
        (labelled(torch.arange(300) % 3 - 1), "labels .*0 to 9, got -1 to 1"),
        (labelled(torch.rand(300)), r"labels .*\(B,\), got torch.float32 \(100,\)"),
        ([], "loader .*no images"),
        ([torch.zeros(2, 3, 32, 32)], r"loader .*\(images \(B, C, H, W\), class indices \(B,\)\)"),
        ([(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))], r"torch\.uint8 .*x\.to"),
        (
            [(torch.zeros(2, 1, 32, 32), torch.zeros(2, dtype=torch.long))],
            r"images .*\(B, 3, H, W\), got \(2, 1, 32, 32\)",
        ),
    ],
)
def test_wrong_data(data, message):
    with pytest.raises(ValueError, match=message):
        EarlyExit(small_model().eval()).calibrate(data, max_accuracy_drop=1.0)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "one of max_accuracy_drop, max_macs, min_speedup, got none"),
        ({"max_macs": 1e6, "min_speedup": 2}, "one of .*, got max_macs, min_speedup"),
        ({"max_accuracy_drop": -1}, "max_accuracy_drop .* 0, got -1"),
        ({"max_macs": float("nan")}, "max_macs .* 1, got nan"),
        ({"min_speedup": 0.5}, "min_speedup .* 1, got 0.5"),
        ({"min_speedup": "2"}, "min_speedup .* 1, got '2'"),
    ],
)
def test_wrong_budgets(budget, message):
    with pytest.raises(ValueError, match=message):
        EarlyExit(small_model().eval()).calibrate(loader(), **budget)
