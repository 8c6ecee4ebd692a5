"""Each method's loss against the equation of its paper, written out in float64."""

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from timm_selfdistill import SelfDistillOutput, SelfDistillTask
from timm_selfdistill.baselines import (
    AttentionTransferTask,
    FitNetTask,
    KnowledgeSynergyLoss,
    MutualLearningTask,
    deep_supervision_loss,
)
from timm_selfdistill.baselines.attention_transfer import attention

from ..conftest import small_backbone, small_model

BATCH, CLASSES = 4, 10
LABELS = torch.tensor([3, 0, 9, 3])


class Given(nn.Module):
    """In the place of a network: gives the same tensors whatever the images are."""

    def __init__(self, *values: Tensor):
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = tuple(value.clone() for value in self.values)  # without a gradient where there is to be none
        return given if len(given) > 1 else given[0]


def leaf(*shape: int) -> Tensor:
    return (2 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def cross_entropy(z: Tensor) -> Tensor:
    """-1/B sum_b log p_b(y_b)."""
    return sum(-torch.log(torch.exp(z[b, y]) / torch.exp(z[b]).sum()) for b, y in enumerate(LABELS.tolist())) / BATCH


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """1/B sum_b sum_k p_bk log(p_bk / q_bk), p of the teacher."""
    p, q = (torch.exp(z / temperature) / torch.exp(z / temperature).sum(1, keepdim=True) for z in (teacher, student))
    return (p * (torch.log(p) - torch.log(q))).sum() / BATCH


def same(got: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def gets_no_gradient(loss: Tensor, tensor: Tensor) -> bool:
    return torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)[0] is None


def pair() -> tuple[nn.Module, nn.Module]:
    """A student and a wider teacher, whose normalisations differ by what float32 holds exactly."""
    student, teacher = small_backbone(), small_backbone("resnet10t")
    student.pretrained_cfg.update(mean=(0.5, 0.25, 0.75), std=(0.25, 0.5, 0.125))
    teacher.pretrained_cfg.update(mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.25))
    return student, teacher


def renormalised(x: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """Images that are normalised for the student, as the teacher would have them."""
    cfgs = student.pretrained_cfg, teacher.pretrained_cfg
    (mean, std), (other_mean, other_std) = (
        [torch.tensor(cfg[key]).view(3, 1, 1).to(x) for key in ("mean", "std")] for cfg in cfgs
    )
    return (x * std + mean - other_mean) / other_std


def test_deep_supervision_is_the_sum_of_all_classifiers_label_losses():
    logits = [leaf(BATCH, CLASSES) for _ in range(3)]
    output = SelfDistillOutput(tuple(logits), tuple(leaf(BATCH, 5, 1, 1) for _ in range(3)))
    same(deep_supervision_loss()(output, LABELS), sum(cross_entropy(z) for z in logits), logits)
    assert deep_supervision_loss().terms(output, LABELS)["distill"] == 0  # none is computed


def test_hintons_distillation_is_timms_own():
    """L = CE(z, y) + w T^2 KL(softmax(v / T) || softmax(z / T)), arXiv:1503.02531, section 2."""
    student, teacher = pair()
    z, v = leaf(BATCH, CLASSES), leaf(BATCH, CLASSES)
    task = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), temperature=4.0, task_loss_weight=0.4, distill_loss_weight=0.7
    )
    task.trainable_module, task.teacher.model = Given(z), Given(v)
    loss = task(torch.zeros(BATCH, 3, 8, 8), LABELS)["loss"]
    assert gets_no_gradient(loss, v)
    same(loss, 0.4 * cross_entropy(z) + 0.7 * 4.0**2 * kl(v.detach(), z, 4.0), [z])


def test_hintons_teacher_sees_images_in_its_own_normalisation():
    student, teacher = pair()
    task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(
        task.teacher.normalize_input(x, task.student_mean, task.student_std), renormalised(x, student, teacher)
    )


def fitnet(guided: Tensor, hint: Tensor, regressor: nn.Conv2d) -> Tensor:
    """Equation 3, 1/2 ||u - r(v)||^2, over half the number of elements of u, and the mean over the batch."""
    weight, bias = regressor.weight[:, :, 0, 0], regressor.bias
    regressed = torch.einsum("od,bdhw->bohw", weight, guided) + bias[:, None, None]
    half_squares = 0.5 * sum(torch.linalg.vector_norm(hint[b] - regressed[b]) ** 2 for b in range(BATCH)) / BATCH
    return half_squares / (hint[0].numel() / 2)


def attention_transfer(maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
    """The authors' loss: for each stage the mean of (Q_S/||Q_S|| - Q_T/||Q_T||)^2, Q = vec(sum_c A_c^2)."""
    total = 0
    for own, teacher in zip(maps, teacher_maps):
        for b in range(BATCH):
            q_s, q_t = ((feature[b] ** 2).sum(0).flatten() for feature in (own, teacher))
            total += ((q_s / torch.sqrt((q_s**2).sum()) - q_t / torch.sqrt((q_t**2).sum())) ** 2).sum() / (
                q_s.numel() * BATCH
            )
    return total


@pytest.mark.parametrize(
    ("make", "levels", "equation", "default"),
    [
        (FitNetTask, [2], lambda task, own, teacher: fitnet(own[0], teacher[0], task.trainable_module.projection), 100),
        (AttentionTransferTask, [1, 2, 3, 4], lambda task, own, teacher: attention_transfer(own, teacher), 1000),
    ],
    ids=["fitnet", "at"],
)
def test_losses_of_feature_maps(make: Callable, levels: list[int], equation: Callable, default: float):
    """The whole task, network and all, in float64; with respect to all weights of student and regressor."""
    task = make(*pair()).double().train()
    student, teacher = deepcopy(task.get_eval_model()), task.teacher.model
    x = torch.randn(BATCH, 3, 64, 64, dtype=torch.float64)
    z, own = student(x), student.forward_intermediates(x, indices=levels, intermediates_only=True)
    others = teacher.forward_intermediates(renormalised(x, student, teacher), indices=levels, intermediates_only=True)
    assert not teacher.training

    got = task(x, LABELS)
    expected = cross_entropy(z) + default * equation(task, own, others)
    torch.testing.assert_close(got["loss"], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got["loss"], got["task_loss"] + default * got["kd_loss"])
    got["loss"].backward()
    for name, expected_gradient in zip(
        dict(student.named_parameters()), torch.autograd.grad(expected, list(student.parameters()))
    ):
        torch.testing.assert_close(
            task.get_eval_model().get_parameter(name).grad, expected_gradient, rtol=1e-6, atol=1e-9
        )
    assert all(p.grad is not None for p in task.trainable_module.parameters())
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())


def test_the_teacher_sees_images_in_its_own_normalisation_also_in_bfloat16():
    student, teacher = (model.bfloat16() for model in pair())
    seen: list[Tensor] = []
    teacher.conv1.register_forward_pre_hook(lambda module, given: seen.extend(given))
    x = torch.randn(BATCH, 3, 32, 32, dtype=torch.bfloat16)
    assert AttentionTransferTask(student, teacher)(x, LABELS)["loss"].isfinite()
    assert seen[0].dtype == torch.bfloat16
    torch.testing.assert_close(seen[0].float(), renormalised(x.float(), student, teacher), rtol=0.02, atol=0.02)


def test_the_regressor_learns_by_the_gradient_of_the_equation():
    task = FitNetTask(*pair()).double()
    guided, hint, regressor = leaf(BATCH, 48, 8, 8), leaf(BATCH, 128, 8, 8).detach(), nn.Conv2d(48, 128, 1).double()
    got = task.compare_maps([regressor(guided)], [hint])
    same(got, fitnet(guided, hint, regressor), [guided, *regressor.parameters()])


def test_attention_is_compared_at_the_students_size_and_equal_maps_have_a_gradient():
    task = AttentionTransferTask(*pair())
    own, teacher = leaf(BATCH, 3, 4, 4), torch.ones(BATCH, 5, 9, 7, dtype=torch.float64)
    expected = attention_transfer([own], [torch.ones(BATCH, 1, 4, 4, dtype=torch.float64)])
    same(task.compare_maps([own], [teacher]), expected, [own])
    loss = task.compare_maps([own], [own.detach()])
    assert loss == 0
    assert torch.autograd.grad(loss, own)[0].abs().max() < 1e-12


def test_no_pixel_of_a_larger_map_is_passed_over():
    """One strong pixel of 8x8, wherever it stands, is one strong pixel of 2x2."""
    teacher = torch.zeros(16, 3, 8, 8)
    for image in range(16):
        teacher[image, :, image // 4, image % 4] = 2.0
    expected = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(16, 4)
    torch.testing.assert_close(attention(teacher, (2, 2)), expected)
    interpolated = attention(teacher[:1, :, :2, :2], (4, 4)).view(4, 4)[0] * 1.625
    assert interpolated.tolist() == pytest.approx([1.0, 0.75, 0.25, 0.0])


def test_mutual_learning_gives_each_network_the_gradient_of_its_own_loss():
    """L_1 = CE(z_1) + KL(p_2 || p_1), L_2 = CE(z_2) + KL(p_1 || p_2), arXiv:1706.00384."""
    task = MutualLearningTask(small_backbone(), small_backbone(), distill_loss_weight=0.6)
    z1, z2 = leaf(BATCH, CLASSES), leaf(BATCH, CLASSES)
    task.trainable_module = Given(z1, z2)
    loss = task(torch.zeros(BATCH, 3, 8, 8), LABELS)["loss"]
    first = cross_entropy(z1) + 0.6 * kl(z2.detach(), z1)
    second = cross_entropy(z2) + 0.6 * kl(z1.detach(), z2)
    same(loss, first + second, [z1, z2])
    torch.testing.assert_close(torch.autograd.grad(loss, z1, retain_graph=True), torch.autograd.grad(first, z1))


def test_knowledge_synergy_is_of_every_ordered_pair_of_classifiers():
    """sum_i CE(z_i) + w sum_(i != j) KL(p_j || p_i), arXiv:1906.00675, and the authors' code."""
    logits = [leaf(BATCH, CLASSES) for _ in range(3)]
    output = SelfDistillOutput(tuple(logits), tuple(leaf(BATCH, 5, 1, 1) for _ in range(3)))
    expected = sum(cross_entropy(z) for z in logits) + 0.3 * sum(
        kl(logits[j].detach(), logits[i]) for i in range(3) for j in range(3) if i != j
    )
    same(KnowledgeSynergyLoss(distill_loss_weight=0.3)(output, LABELS), expected, logits)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FitNetTask(*pair()),
        lambda: AttentionTransferTask(*pair()),
        lambda: MutualLearningTask(small_backbone(), small_backbone()),
        lambda: SelfDistillTask(small_model(), KnowledgeSynergyLoss()),
        lambda: SelfDistillTask(small_model(), deep_supervision_loss()),
        lambda: LogitDistillationTask(*pair(), nn.CrossEntropyLoss()),
    ],
    ids=["fitnet", "at", "dml", "dks", "dsn", "kd"],
)
def test_in_bfloat16_the_loss_is_finite_and_close_to_the_one_in_float32(make: Callable):
    task, x = make().eval(), torch.randn(BATCH, 3, 32, 32)
    exact = task(x, LABELS)["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(x, LABELS)["loss"]
    assert loss.dtype == torch.float32
    assert math.isfinite(exact)
    assert loss.item() == pytest.approx(exact, rel=0.05)
