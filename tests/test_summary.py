import re
from io import StringIO

import pytest
import timm
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from timm_selfdistill import wrap_self_distill

from .conftest import small_model


def test_rows_add_up():
    model = small_model()
    rows = model.summary((3, 64, 64))
    assert [(row.exit, row.module) for row in rows] == [
        (0, "layer1"),
        (1, "layer2"),
        (2, "layer3"),
        (3, "layer4"),
        ("ensemble", "layer4"),
    ]
    assert [row.head_params for row in rows[:3]] == [sum(p.numel() for p in head.parameters()) for head in model.heads]
    assert (rows.plain.head_params, rows.plain.head_macs, rows.plain.share) == (0, 0, 1.0)
    assert rows.plain.params == sum(p.numel() for p in model.backbone.parameters())
    assert rows.total.head_params == sum(p.numel() for p in model.heads.parameters())
    assert rows.total.params == sum(p.numel() for p in model.parameters())
    assert rows.total.head_macs == sum(row.head_macs for row in rows[:3]) == rows.total.macs - rows.plain.macs
    assert rows.total.share == pytest.approx(rows.total.macs / rows.plain.macs)


def test_multiply_adds_are_half_of_what_torch_counts():
    model = small_model().eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.predict(torch.randn(1, 3, 64, 64), exit="ensemble")
    assert model.summary((3, 64, 64)).total.macs == flops.get_total_flops() // 2


def test_it_prints_as_a_table_that_fits_80_columns():
    lines = str(wrap_self_distill(timm.create_model("cifar_resnet18")).summary()).splitlines()
    assert max(map(len, lines)) <= 80
    text = [line.split() for line in lines if line.strip()]
    assert " ".join(text[0] + text[1]) == "head head exit stage feature params MACs params MACs share"
    assert " ".join(text[3]) == "0 layer1 64x32x32 0.20 M 0.51 M 0.35 M 153.27 M 27.6%"
    assert " ".join(text[6]) == "3 layer4 512x4x4 - - 11.22 M 555.47 M 100.0%"
    assert " ".join(text[7]) == "ensemble layer4 512x4x4 0.67 M 2.50 M 11.89 M 557.97 M 100.4%"


def test_rich_prints_the_same_table():
    console = Console(width=100, record=True, file=StringIO())
    summary = small_model().summary()
    console.print(summary)
    assert console.export_text().rstrip() == str(summary)


def test_a_notebook_prints_it_as_well(monkeypatch, capsys):
    """In which rich displays what it is given, whatever file it should go to."""
    summary = small_model().summary()
    expected = str(summary)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(summary) == expected
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", [(3, 32), (1, 32, 32), 32, "3x32x32", ()])
def test_a_wrong_input_size_is_refused(size):
    with pytest.raises(ValueError, match=rf"input_size .*\(3, height, width\), got {re.escape(repr(size))}$"):
        small_model().summary(size)
