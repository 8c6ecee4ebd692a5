"""Labels as loaders may give them."""

import pytest
import torch
from torch import Tensor

from timm_selfdistill import SelfDistillTask
from timm_selfdistill.analysis import measure_agreement, measure_flatness, measure_gradients, measure_separability

from ..conftest import small_model

MEASURES = {
    "agreement": measure_agreement,
    "flat minima": lambda model, data: measure_flatness(model, data, levels=[0.1], draws=1),
    "gradients": lambda model, data: measure_gradients(SelfDistillTask(model), data),
    "separability": measure_separability,
}


def batches(dtype: torch.dtype = torch.int64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(20, 3, 32, 32, generator=generator), (torch.arange(20) % 10).to(dtype)) for _ in range(2)]


EMPTY = torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
def test_all_integers_are_class_indices(dtype, measure):
    model = small_model()
    assert MEASURES[measure](model, batches(dtype)).to_dict() == MEASURES[measure](model, batches()).to_dict()


@pytest.mark.parametrize("measure", MEASURES)
def test_a_batch_without_images_counts_for_nothing(measure):
    model = small_model()
    with_empty = MEASURES[measure](model, [EMPTY, *batches(), EMPTY]).to_dict()
    assert with_empty == MEASURES[measure](model, batches()).to_dict()
    with pytest.raises(ValueError, match="loader .*no images"):
        MEASURES[measure](model, [EMPTY])
