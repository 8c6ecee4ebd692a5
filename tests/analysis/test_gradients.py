"""Gradients of a linear network, by hand; and that measuring them leaves no trace."""

from io import StringIO
from math import exp

import pytest
import torch
from rich.console import Console
from timm.task import ClassificationTask, TrainingTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_selfdistill import SelfDistillLoss, SelfDistillTask, wrap_self_distill
from timm_selfdistill.analysis import (
    find_sections,
    measure_gradients,
    plot_gradient_history,
    plot_gradients,
    section_gradients,
)

from ..baselines.test_runs import TASKS
from ..conftest import small_backbone, small_model


class LinearNetwork(nn.Module):
    """logits = (z, -z), z = 0.5 * 3 * x, for images of one pixel; as timm would make it."""

    num_classes, in_chans = 2, 1

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, 1, 1)}
        self.feature_info = [{"module": f"layer{i}", "num_chs": 1, "reduction": 1} for i in (1, 2)]
        self.layer2 = nn.Conv2d(1, 1, 1, bias=False)  # not in the order in which they run
        self.layer1 = nn.Conv2d(1, 1, 1, bias=False)
        self.fc = nn.Linear(1, 2, bias=False)
        for layer, value in ((self.layer1, [3]), (self.layer2, [0.5]), (self.fc, [1, -1])):
            layer.weight.data = torch.tensor(value, dtype=torch.float).view_as(layer.weight)

    def forward_intermediates(self, x, indices=None, intermediates_only=False, **_):
        maps = [first := self.layer1(x), self.layer2(first)]
        chosen = [maps[index] for index in indices]
        return chosen if intermediates_only else (maps[-1], chosen)

    def forward_head(self, x):
        return self.fc(x.flatten(1))

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.forward_head(self.layer2(self.layer1(x)))


class LinearHead(nn.Module):
    """logits = (x, -x) of the pixel that it is given."""

    def __init__(self, stage, teacher, num_classes):
        super().__init__()
        self.fc = nn.Linear(1, num_classes, bias=False)
        self.fc.weight.data = torch.tensor([[1.0], [-1]])

    def forward(self, x):
        return self.fc(x.flatten(1)), x


PIXEL = [(torch.full((1, 1, 1, 1), 2.0), torch.tensor([0]))]  # layer 1 makes 6 of it, layer 2 makes 3
WRONG = 1 / (1 + exp(6))  # probability of class 1 where the logits are 3 and -3
WRONG_SHALLOW = 1 / (1 + exp(12))


def plain_task(model: nn.Module) -> ClassificationTask:
    return ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)


def test_the_gradients_of_a_linear_network():
    """d loss / d z = -2 q; times 0.5 * 2 for the first layer's weight, and times 6 for the second's."""
    report = measure_gradients(plain_task(LinearNetwork()), PIXEL, exits=["layer1"])
    assert report.sections == ["layer1", "layer2"]
    assert report.gradients == pytest.approx([2 * WRONG, 12 * WRONG], rel=1e-4)
    assert report.weights == [1, 1]
    assert report.loss == pytest.approx(-torch.tensor(1 - WRONG).log().item(), rel=1e-3)


def test_the_shallow_classifier_adds_to_the_first_section_alone():
    """Of its own loss -2 q' * 2 reach the first layer's weight."""
    model = wrap_self_distill(LinearNetwork(), exits=[0], head=LinearHead)
    task = SelfDistillTask(model, SelfDistillLoss(alpha=0, hint=None))
    report = measure_gradients(task, PIXEL)
    assert report.gradients == pytest.approx([2 * WRONG + 4 * WRONG_SHALLOW, 12 * WRONG], rel=1e-4)


def test_means_are_over_elements_and_batches():
    model = LinearNetwork()
    two = [(torch.full((1, 1, 1, 1), value), torch.tensor([0])) for value in (2.0, -2.0)]
    report = measure_gradients(plain_task(model), two, exits=[0])  # the second image is as wrong as the first is right
    assert report.gradients == pytest.approx([1.0, 6.0])
    assert (report.batches, report.images, report.batch_size) == (2, 2, 1)
    loss = model(PIXEL[0][0]).sum() * 0 + 3 * model.fc.weight[0, 0] - 4 * model.fc.weight[1, 0] ** 2
    assert section_gradients(loss, [[model.fc.weight], []]) == [pytest.approx((3 + 8) / 2), 0]


def batches(count: int = 16) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 10), 8)


def gradients_by_hand(task: TrainingTask, data: DataLoader, student: nn.Module) -> list[float]:
    """Of a training step, in the convolutions of each stage; the stem counts to the first."""
    task.train()(*next(iter(data)))["loss"].backward()
    grads = [
        [
            p.grad.flatten()
            for name, p in student.named_parameters()
            if p.ndim == 4 and (name.startswith(section) or (section == "layer1" and name.startswith("conv1")))
        ]
        for section in ("layer1", "layer2", "layer3", "layer4")
    ]
    return [float(torch.cat(parts).abs().mean()) for parts in grads]


def test_they_are_those_of_a_training_step():
    task = SelfDistillTask(small_model()).train()
    data = DataLoader(batches().dataset, 16)
    report = measure_gradients(task, data)
    assert report.gradients == pytest.approx(gradients_by_hand(task, data, task.trainable_module.backbone), rel=1e-4)


def test_a_short_last_batch_is_left_out():
    """Of one image, from which batch norm learns nothing, and whose gradient would count like that of eight."""
    task = SelfDistillTask(small_model())
    report = measure_gradients(task, batches(17))
    assert (report.batches, report.images, report.batch_size) == (2, 16, 8)
    assert report.gradients == measure_gradients(task, list(batches(17))[:2]).gradients


@pytest.mark.parametrize("method", TASKS)
def test_tasks_in_which_more_than_the_network_learns(method):
    """The student is measured, by its task's own loss."""
    task = TASKS[method]()
    generator = torch.Generator().manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(8, 1, 32, 32, generator=generator), torch.arange(8)), 8)
    report = measure_gradients(task, data)
    assert report.sections == ["layer1", "layer2", "layer3", "layer4"]
    model = task.get_eval_model()
    expected = gradients_by_hand(task, data, model.backbone if method in ("dsn", "dks") else model)
    assert report.gradients == pytest.approx(expected, rel=1e-4)


def test_nothing_changes():
    model = small_model().eval()
    model.backbone.drop_rate = 0.5
    task = SelfDistillTask(model).eval()
    task(*next(iter(batches())))["loss"].backward()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    grads, state = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    measure_gradients(task, batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_every_weight_that_learns_is_in_one_section(name):
    backbone = small_backbone(name)
    sections = find_sections(backbone, torch.randn(1, 3, 160, 160))
    found = [id(weight) for weights in sections.values() for weight in weights]
    layers = {id(m.weight) for m in backbone.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert len(found) == len(set(found))
    assert set(found) == layers - {id(backbone.get_classifier().weight)}
    assert all(sections.values())


def test_vit_layers_are_told_apart_by_depth():
    sections = find_sections(backbone := small_backbone("test_vit"), torch.randn(1, 3, 160, 160), exits=[1])
    assert list(sections) == ["blocks.1", f"blocks.{len(backbone.blocks) - 1}"]
    assert any(weight is backbone.patch_embed.proj.weight for weight in sections["blocks.1"])
    assert any(weight is backbone.blocks[2].attn.qkv.weight for weight in [*sections.values()][1])


def test_frozen_sections_have_no_gradient(tmp_path):
    backbone = small_backbone()
    for part in (backbone.conv1, backbone.layer1):
        part.requires_grad_(False)
    report = measure_gradients(plain_task(backbone), batches())
    assert report.gradients[0] is None
    assert report.weights[0] == 0
    assert all(value > 0 for value in report.gradients[1:])
    other = measure_gradients(SelfDistillTask(small_model()), batches())
    plot_gradients(tmp_path / "gradients.png", {"frozen": report, "other": other})
    plot_gradient_history(tmp_path / "history.png", {"frozen": [report, report], "other": [other, other]})
    for name in ("gradients.png", "history.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    out = StringIO()
    Console(file=out, width=120).print(report)
    assert "to layer4" in out.getvalue()
    assert report.to_dict()["gradients"] == report.gradients


def test_what_cannot_be_measured():
    with pytest.raises(TypeError, match=r"timm\.task\.TrainingTask, got ResNet; .*SelfDistillTask\(model\)"):
        measure_gradients(small_backbone(), batches())
    with pytest.raises(ValueError, match=r"ResNet .*no gradients; .*requires_grad_\(True\)"):
        measure_gradients(plain_task(small_backbone().requires_grad_(False)), batches())
    frozen = small_model(freeze_backbone=True)
    for learns in (False, True):  # the weights of the second would get gradients of 0
        with pytest.raises(ValueError, match="frozen backbone.* no gradients$"):
            measure_gradients(SelfDistillTask(frozen.requires_grad_(learns)), batches())
    with pytest.raises(ValueError, match="ResNet .*'layer9' .*layer1"):
        measure_gradients(plain_task(small_backbone()), batches(), exits=["layer9"])
    with pytest.raises(ValueError, match="loader .*no images"):
        measure_gradients(plain_task(small_backbone()), [])
    with pytest.raises(ValueError, match="labels .*0 to 9, got 0 to 10"):
        measure_gradients(plain_task(small_backbone()), [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 10]))])
    backbone = small_backbone()
    nn.init.constant_(backbone.fc.bias, float("nan"))
    with pytest.raises(ValueError, match="loss is nan, .*damaged"):
        measure_gradients(plain_task(backbone), batches())
