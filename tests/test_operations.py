"""How many operations a training step launches: what sets the pace on a GPU whose kernels are short."""

import pytest
import torch

from timm_selfdistill import SelfDistillLoss

LIMITS = {
    "cifar_resnet18": 1.45,
    "resnet18": 1.45,
    "resnet50": 1.18,
    "convnext_tiny": 1.22,
    "vit_small_patch16_224": 1.20,
}


@pytest.mark.parametrize(("network", "limit"), LIMITS.items())
def test_all_exits_launch_few_operations_more_than_the_plain_network(network, limit, benchmarks):
    row = benchmarks("operations").measure(network, SelfDistillLoss())
    assert 1 < row["ratio"] <= limit
    assert row["ours"]["loss"] <= 17


def test_views_are_not_counted(benchmarks):
    with benchmarks("operations").LaunchedOperations() as operations:
        x = torch.ones(4, 6)
        (x.t()[1:].view(-1, 2, 2) + 1).relu_()
    assert operations.counts == {"aten.ones.default": 1, "aten.add.Tensor": 1, "aten.relu_.default": 1}
