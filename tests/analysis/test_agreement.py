"""Answers made by hand, whose agreement can be counted on one's fingers."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from timm_selfdistill.analysis import compare_answers, measure_agreement, plot_agreement

from ..conftest import small_backbone, small_model

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
ANSWERS = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 0, 1, 2, 0],  # wrong on 2, 3, 6, 9
        [0, 0, 0, 2, 1, 1, 0, 1, 2, 2],  # wrong on 3, 6
        [0, 1, 0, 1, 1, 1, 0, 1, 2, 2],  # wrong on 1, 3, 6
    ]
)


def test_hand_made_answers():
    report = compare_answers(ANSWERS, LABELS, ["layer1", "layer2", "layer4"])
    assert report.images == 10
    assert report.top1 == pytest.approx([60, 80, 70])
    assert report.same_answer == [pytest.approx(row) for row in ([1, 0.7, 0.7], [0.7, 1, 0.8], [0.7, 0.8, 1])]
    assert report.both_wrong == [pytest.approx(row) for row in ([0.4, 0.2, 0.2], [0.2, 0.2, 0.2], [0.2, 0.2, 0.3])]
    assert report.error_overlap == [
        pytest.approx(row) for row in ([1, 2 / 4, 2 / 5], [2 / 4, 1, 2 / 3], [2 / 5, 2 / 3, 1])
    ]
    kappa = [(0.8 - 0.56) / (1 - 0.56), (0.7 - 0.54) / (1 - 0.54), (0.9 - 0.62) / (1 - 0.62)]
    assert report.error_kappa == [
        pytest.approx(row) for row in ([1, kappa[0], kappa[1]], [kappa[0], 1, kappa[2]], [kappa[1], kappa[2], 1])
    ]
    assert report.overthought == [[1], [1]]
    assert report.any_right == pytest.approx(80)


def test_independent_errors_have_no_kappa_beyond_chance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(100_000, dtype=torch.long)
    answers = (torch.rand(2, 100_000, generator=generator) < torch.tensor([[0.3], [0.2]])).long()
    report = compare_answers(answers, labels)
    assert report.error_kappa[0][1] == pytest.approx(0, abs=0.01)
    assert report.error_overlap[0][1] == pytest.approx(0.06 / 0.44, abs=0.01)


def test_what_cannot_be_told_where_no_exit_errs(tmp_path):
    report = compare_answers(LABELS.repeat(2, 1), LABELS)
    assert report.error_overlap == report.error_kappa == [[None, None], [None, None]]
    assert report.same_answer == [[1, 1], [1, 1]]
    assert report.any_right == 100
    plot_agreement(tmp_path / "agreement.png", report)
    Console(file=StringIO()).print(report)


def loader(labels: torch.Tensor, size: int = 32) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(len(labels), 3, size, size, generator=generator), labels), 20)


def test_a_model_is_run_once_for_each_batch(tmp_path):
    model, data = small_model().train(), loader(torch.arange(50) % 10)
    calls = []
    model.backbone.layer1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    report = measure_agreement(model, data)
    assert calls == [False, False, False]
    assert model.training
    x, y = data.dataset.tensors
    with torch.no_grad():
        answers = torch.stack([logits.argmax(1) for logits in model.eval().forward_exits(x).logits])
    assert report == compare_answers(answers, y, ["layer1", "layer2", "layer3", "layer4"])
    assert report.to_dict()["exits"] == ["layer1", "layer2", "layer3", "layer4"]
    plot_agreement(tmp_path / "agreement.png", report)
    assert (tmp_path / "agreement.png").read_bytes().startswith(b"\x89PNG")
    out = StringIO()
    Console(file=out, width=120).print(report)
    assert "exits on 50 images" in out.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (loader(torch.full((4,), -1)), "labels .*0 to 9, got -1 to -1; -1 .*without a label"),
        (loader(torch.tensor([10])), "labels .*0 to 9, got 10 to 10$"),
        (loader(torch.rand(4)), r"labels .*\(B,\), got torch.float32 \(4,\)"),
        (loader(torch.zeros(4, dtype=torch.bool)), r"labels .*\(B,\), got torch.bool \(4,\)"),
        ([torch.zeros(2, 3, 32, 32)], r"loader .*\(images \(B, C, H, W\), class indices \(B,\)\)"),
        ([], "loader .*no images"),
    ],
)
def test_wrong_data(data, message):
    with pytest.raises(ValueError, match=message):
        measure_agreement(small_model(), data)


def test_models_without_exits_and_damaged_ones_are_refused():
    for model in (small_backbone(), small_model().truncate(1)):
        message = f"agreement .*SelfDistillModel, got {type(model).__name__}, .*wrap_self_distill"
        with pytest.raises(ValueError, match=message):
            measure_agreement(model, loader(torch.arange(10)))
    model = small_model()
    torch.nn.init.constant_(model.heads[1].fc.bias, float("nan"))
    with pytest.raises(ValueError, match="logits .*no finite numbers"):
        measure_agreement(model, loader(torch.arange(10)))
    with pytest.raises(ValueError, match=r"answers \(C, N\) .*labels \(N,\), .*got \(3, 10\) and \(5,\)"):
        compare_answers(ANSWERS, LABELS[:5])
