"""What a Trainer takes for labels, and how it measures with them."""
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from timm_selfdistill.training.labels import class_indices

from .test_trainer import fit, make_task

INDICES = torch.arange(10).repeat(2)


class Images(Dataset):
    def __init__(self, labels):
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(index)), self.labels[index]


def test_one_hot_labels_are_measured_as_their_classes(tmp_path):
    one_hot, indices = ((Images(labels),) * 2 for labels in (torch.eye(10)[INDICES], INDICES))
    results = [fit(tmp_path / str(i), data, batch_size=10)[0] for i, data in enumerate((one_hot, indices))]
    first, second = ([(row["top1"], row["top5"], row["loss"]) for row in result.summary["exits"]] for result in results)
    assert np.allclose(first, second, rtol=1e-3)
    with pytest.raises(ValueError, match="smoothing, mixup .*training images have soft ones; leave them out"):
        fit(tmp_path / "c", one_hot, batch_size=10, smoothing=0.1)


def test_soft_labels_are_measured_by_their_likeliest_class():
    assert class_indices(torch.tensor([[0.2, 0.8], [0.6, 0.4]]), 2, "validation").tolist() == [1, 0]
    assert class_indices(torch.tensor([1, 0], dtype=torch.uint8), 2, "validation").dtype == torch.int64


@pytest.mark.parametrize(("label", "got"), [
    (torch.tensor([1.0, 1] + [0] * 8), r"\[1.0, 1.0, 0.0, .* one class an image"), (torch.zeros(10), r"\[0.0, 0.0"),
    (torch.eye(9)[0], r"float32 of shape \(9,\)"), (torch.eye(10).long()[0], r"int64 of shape \(10,\)"),
    (torch.tensor([3]), r"int64 of shape \(1,\)"), (np.array([3]), r"int64 of shape \(1,\)"),
    (torch.tensor(True), r"bool of shape \(\)"), (3.0, r"float32 of shape \(\)"), (-2, "-2"), (10, "10"),
    ("cat", "str 'cat'"), ([0, 1], r"list \[0, 1\]"),
], ids=str)
@pytest.mark.parametrize("part", ["training", "validation"])
def test_labels_that_are_none_are_refused_at_the_beginning(part, label, got, tmp_path):
    data = {"training": Images(INDICES), "validation": Images(INDICES), part: Images([label] * 20)}
    expected = rf"the {part} images must have class indices, .*0 to 9, .*\(10,\).*got (torch.)?{got}"
    with pytest.raises(ValueError, match=expected):
        fit(tmp_path / "run", data.values(), batch_size=10)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [-1, 10])
def test_a_later_label_too(label, tmp_path):
    data = Images(INDICES), Images([*INDICES[:-1].tolist(), label])
    with pytest.raises(ValueError, match=f"the validation images .*0 to 9, .*got {label}"):
        fit(tmp_path / "run", data, make_task(), batch_size=10)
    assert not (tmp_path / "run").exists()  # so that the corrected command may have it
