"""Deeply-supervised nets (DSN), arXiv:1409.5185, on the same shallow classifiers as self distillation."""

from ..loss import LabelLoss, SelfDistillLoss


def deep_supervision_loss(label_loss: LabelLoss | None = None) -> SelfDistillLoss:
    """Every classifier learns from the labels, with equal weights, and from nothing else.

    The paper's companion objective is a squared hinge loss with a threshold; here it is the label loss of all
    classifiers, as in "Be Your Own Teacher", which compares with it.

    Args:
        label_loss: as of `SelfDistillLoss`.
    """
    return SelfDistillLoss(alpha=0.0, beta=0.0, label_loss=label_loss)
