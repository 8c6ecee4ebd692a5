import torch
from torch import nn

from timm_selfdistill.training.outputs.metrics import ExitMeter, exit_logits

from ..conftest import small_model


def test_hits_and_loss_of_each_exit_and_their_ensemble():
    shallow = torch.tensor([[3.0, 0, 0, 0, 0, 0], [0, 3.0, 0, 0, 0, 0]])
    deep = torch.tensor([[0, 4.0, 0, 0, 0, 0], [0, 4.0, 0, 0, 0, 0]])
    meter = ExitMeter(2, torch.device("cpu"))
    meter.update((shallow[:1], deep[:1]), torch.tensor([0]))
    meter.update((shallow[1:], deep[1:]), torch.tensor([1]))
    first, second, ensemble = meter.compute(meter.totals)
    assert (first.exit, second.exit, ensemble.exit) == (0, 1, "ensemble")
    assert (first.top1, second.top1, ensemble.top1) == (100, 50, 50)
    assert first.top5 == 100
    expected = nn.functional.cross_entropy((shallow + deep) / 2, torch.tensor([0, 1])).item()
    torch.testing.assert_close(torch.tensor(ensemble.loss), torch.tensor(expected), check_dtype=False)


def test_top5_where_there_are_fewer_classes():
    meter = ExitMeter(1, torch.device("cpu"))
    meter.update((torch.tensor([[1.0, 0.0]]),), torch.tensor([1]))
    (row,) = meter.compute(meter.totals)
    assert (row.exit, row.top1, row.top5) == (0, 0, 100)


def test_a_plain_model_has_one_exit():
    x = torch.randn(2, 3, 64, 64)
    assert len(exit_logits(small_model().eval(), x)) == 4
    assert len(exit_logits(small_model().backbone, x)) == 1
