import math

import numpy as np
import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from torch import nn

from timm_selfdistill import SelfDistillLoss, SelfDistillOutput

from .conftest import small_model

BATCH, CLASSES = 5, 7


def random_output(dtype=torch.float32, requires_grad=False, exits=4, scale=3.0) -> SelfDistillOutput:
    def tensor(*shape):
        return (scale * torch.randn(*shape)).to(dtype).requires_grad_(requires_grad)

    return SelfDistillOutput(
        tuple(tensor(BATCH, CLASSES) for _ in range(exits)), tuple(tensor(BATCH, 6, 2, 3) for _ in range(exits))
    )


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def paper(output, soft_target, temperature, alpha, beta, hint, teacher) -> dict[str, float]:
    """The equation of arXiv:1905.08094, section 3, written down in float64 numpy, classifier by classifier."""
    logits = [z.detach().numpy().astype(np.float64) for z in output.logits]
    features = [f.detach().numpy().astype(np.float64) for f in output.features]
    if hint == "pooled":
        features = [f.mean((2, 3)) for f in features]
    deepest = len(logits) - 1
    z_teacher = np.mean(logits, 0) if teacher == "ensemble" else logits[deepest]
    terms = {"label": 0.0, "distill": 0.0, "hint": 0.0}
    for i, (z, f) in enumerate(zip(logits, features)):
        student = i < deepest or teacher == "ensemble"
        cross_entropy = -(soft_target * np.log(softmax(z))).sum(1).mean()
        terms["label"] += ((1 - alpha) if student else 1) * cross_entropy
        if student:
            p, q = softmax(z_teacher / temperature), softmax(z / temperature)
            terms["distill"] += (p * (np.log(p) - np.log(q))).sum(1).mean()
        if i < deepest and hint:
            squared_l2 = ((f - features[deepest]) ** 2).reshape(BATCH, -1).sum(1).mean()
            terms["hint"] += squared_l2 / features[deepest][0].size
    return {**terms, "loss": terms["label"] + alpha * terms["distill"] + beta * terms["hint"]}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("teacher", ["deepest", "ensemble"])
@pytest.mark.parametrize("hint", ["map", "pooled", None])
@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(3.0, 0.3, 0.03), (1.0, 0.9, 2.0), (7.5, 0.0, 0.0)])
def test_every_term_equals_the_papers_equation(temperature, alpha, beta, hint, teacher, soft):
    output = random_output()
    labels = torch.randint(CLASSES, (BATCH,))
    one_hot = nn.functional.one_hot(labels, CLASSES).double()
    target = (0.8 * one_hot + 0.2 / CLASSES).float() if soft else labels
    soft_target = (target if soft else one_hot).double().numpy()
    expected = paper(output, soft_target, temperature, alpha, beta, hint, teacher)
    got = SelfDistillLoss(temperature, alpha, beta, hint=hint, teacher=teacher, t_squared=False).terms(output, target)
    assert set(got) == {"loss", "label", "distill", "hint"}
    for name, weight in (("distill", alpha), ("hint", beta)):
        if not weight:  # it has no part in the loss, and is not computed
            expected[name] = 0
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_with_t_squared_gradients_do_not_shrink_with_the_temperature():
    """As in Hinton's KD (arXiv:1503.02531, 2.1): for high temperatures they come to (z - z_teacher) / K, less means."""
    labels = torch.randint(CLASSES, (BATCH,))
    for teacher in ("deepest", "ensemble"):
        plain, squared = (
            SelfDistillLoss(4.0, teacher=teacher, t_squared=on).terms(random, labels)
            for random in [random_output()]
            for on in (False, True)
        )
        assert squared["distill"].item() == pytest.approx(16 * plain["distill"].item(), rel=1e-6)
        added = squared["loss"].item() - plain["loss"].item()
        assert added == pytest.approx(0.3 * 15 * plain["distill"].item(), rel=1e-4)
    output = random_output(torch.float64, requires_grad=True, exits=2)
    SelfDistillLoss(1000.0, alpha=1.0, teacher="deepest")(output).backward()
    student, deepest = (z.detach() - z.detach().mean(1, keepdim=True) for z in output.logits)
    torch.testing.assert_close(output.logits[0].grad, (student - deepest) / CLASSES / BATCH, rtol=0.02, atol=2e-4)
    assert not output.logits[1].grad.any()


def test_the_papers_loss_is_one_call():
    assert repr(SelfDistillLoss.paper()) == (
        "SelfDistillLoss(temperature=3.0, alpha=0.3, beta=0.03, hint='map', teacher='deepest', t_squared=False)"
    )
    loss = SelfDistillLoss.paper(alpha=0.5, hint="pooled", label_loss=nn.CrossEntropyLoss())
    assert (loss.alpha, loss.hint, loss.teacher) == (0.5, "pooled", "deepest")
    assert isinstance(loss.label_loss, nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match="hint must be .*'maps'"):
        SelfDistillLoss.paper(hint="maps")


def test_without_beta_no_hint_is_computed():
    """Features that cannot be compared do not matter then."""
    output = random_output()
    output = output._replace(features=tuple(torch.full((1, i + 1), math.nan) for i in range(4)))
    terms = SelfDistillLoss.paper(beta=0)(output, torch.arange(BATCH))
    assert terms.isfinite()


def test_beta_is_lambda_times_the_size_of_a_feature():
    output = random_output()
    lam = 1e-3
    written_out = sum(((f - output.features[-1]) ** 2).sum((1, 2, 3)).mean() for f in output.features)
    loss = SelfDistillLoss.paper(beta=lam * 6 * 2 * 3)
    assert (loss.beta * loss.terms(output)["hint"]).item() == pytest.approx(lam * written_out.item(), rel=1e-5)


@pytest.mark.parametrize("hint", ["map", "pooled"])
def test_distillation_and_hint_send_no_gradient_to_the_deepest_classifier(hint):
    output = random_output(requires_grad=True)
    terms = SelfDistillLoss.paper(hint=hint).terms(output, torch.zeros(BATCH, dtype=torch.long))
    (terms["distill"] + terms["hint"]).backward()
    assert output.logits[-1].grad is None or not output.logits[-1].grad.any()
    assert output.features[-1].grad is None or not output.features[-1].grad.any()
    for shallow in (*output.logits[:-1], *output.features[:-1]):
        assert shallow.grad.abs().sum() > 0


def test_in_a_network_the_hint_reaches_the_backbone_through_the_shallow_features_only():
    model = small_model().train()
    terms = SelfDistillLoss.paper().terms(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1]))
    (terms["distill"] + terms["hint"]).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.backbone.layer4.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.backbone.fc.parameters())
    assert sum(p.grad.abs().sum() for p in model.backbone.layer1.parameters()) > 0


def test_the_ensemble_teaches_the_deepest_too():
    output = random_output(requires_grad=True)
    SelfDistillLoss(teacher="ensemble").terms(output)["distill"].backward()
    assert all(z.grad.abs().sum() > 0 for z in output.logits)


def test_without_labels_the_exits_learn_from_the_teacher_alone():
    output = random_output()
    loss = SelfDistillLoss(alpha=0.5, beta=0.1)
    terms = loss.terms(output)
    assert terms["label"] == 0
    assert loss(output) == 0.5 * terms["distill"] + 0.1 * terms["hint"]


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(label_smoothing=0.1), LabelSmoothingCrossEntropy(0.1), BinaryCrossEntropy()]
)
def test_the_label_loss_is_any_criterion(criterion):
    output, target = random_output(), torch.randint(CLASSES, (BATCH,))
    *shallow, deepest = (criterion(z, target) for z in output.logits)
    got = SelfDistillLoss.paper(alpha=0.25, label_loss=criterion).terms(output, target)["label"]
    torch.testing.assert_close(got, 0.75 * sum(shallow) + deepest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computed_in_float32_also_under_autocast(dtype):
    output = random_output(dtype)
    in_float32 = SelfDistillOutput(tuple(z.float() for z in output.logits), tuple(f.float() for f in output.features))
    target = torch.randint(CLASSES, (BATCH,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = SelfDistillLoss().terms(output, target)
    for name, value in SelfDistillLoss().terms(in_float32, target).items():
        assert got[name].dtype == torch.float32
        assert got[name] == value, name


@pytest.mark.parametrize("teacher", ["deepest", "ensemble"])
@pytest.mark.parametrize("logit", [1e4, 1e30, 3e38])
def test_finite_for_any_finite_logits(logit, teacher):
    logits = tuple(logit * torch.eye(CLASSES)[:BATCH].roll(i, 1).sub(0.5 * (i % 2)) for i in range(3))
    output = SelfDistillOutput(tuple(z.requires_grad_() for z in logits), (torch.ones(BATCH, 2, 1, 1),) * 3)
    loss = SelfDistillLoss(teacher=teacher)(output, torch.arange(BATCH))
    loss.backward()
    assert loss.isfinite()
    assert all(z.grad.isfinite().all() for z in logits)


def test_nan_logits_give_a_nan_loss():
    output = random_output()
    output.logits[1][0, 0] = math.nan
    assert SelfDistillLoss()(output, torch.zeros(BATCH, dtype=torch.long)).isnan()


@pytest.mark.parametrize(
    "number",
    [
        {"temperature": 0},
        {"temperature": math.inf},
        {"alpha": 1.1},
        {"alpha": -0.1},
        {"alpha": math.nan},
        {"beta": -1},
        {"hint": "maps"},
        {"teacher": "first"},
    ],
)
def test_settings_out_of_range_are_refused(number):
    ((name, value),) = number.items()
    with pytest.raises(ValueError, match=f"^{name} .*, got .?{value}"):
        SelfDistillLoss(**number)


def test_a_label_loss_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="label_loss .*criterion.*got 'bce'"):
        SelfDistillLoss(label_loss="bce")


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 7]), ValueError, r"class indices .*0\.\.6, got 7"),
        (torch.tensor([0, 1, 2, 3, -1]), ValueError, r"class indices .*0\.\.6, got -1"),
        (torch.tensor([0, 1, 2, 3, -100]), ValueError, r"class indices .*0\.\.6, got -100"),
        (torch.zeros(5), TypeError, r"class indices .*got torch\.float32; .*target\.long\(\)"),
        (torch.zeros(5, dtype=torch.bool), TypeError, r"class indices .*got torch\.bool; .*target\.long\(\)"),
        (torch.zeros(4, dtype=torch.long), ValueError, r"class indices \(5,\) or soft labels \(5, 7\)"),
        (torch.zeros(5, 6), ValueError, r"class indices \(5,\) or soft labels \(5, 7\)"),
        ([0, 1, 2, 3, 4], TypeError, "target .*tensor, got list"),
    ],
)
def test_bad_targets_are_refused(target, error, message):
    with pytest.raises(error, match=message):
        SelfDistillLoss()(random_output(), target)


def test_plain_logits_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"got Tensor.*use model.forward_exits\(x\)"):
        SelfDistillLoss()(torch.zeros(5, 7), torch.zeros(5, dtype=torch.long))
