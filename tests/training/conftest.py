import pytest
from torch.utils.data import Subset


@pytest.fixture(autouse=True)
def _unrendered(unrendered):
    """Pictures are not what these tests are about."""


@pytest.fixture
def few(fashion_tensors):
    """95 images: the last batch of an epoch is not full."""
    return Subset(fashion_tensors[0], range(95)), Subset(fashion_tensors[1], range(50))
