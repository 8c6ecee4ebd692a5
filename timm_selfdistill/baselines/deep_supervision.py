"""Deeply-supervised nets (DSN), arXiv:1409.5185, on the same shallow classifiers as self distillation."""

from ..loss import LabelLoss, SelfDistillLoss


def deep_supervision_loss(label_loss: LabelLoss | None = None) -> SelfDistillLoss:
    """Every classifier learns from the labels, with equal weights, and from nothing else.

    The paper's companion objective is a squared hinge loss with a threshold; here it is the label loss of all
    classifiers, as in "Be Your Own Teacher", which compares with it.

    Args:
        label_loss: as of `SelfDistillLoss`.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.baselines import deep_supervision_loss
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).train()
        >>> criterion = deep_supervision_loss()
        >>> criterion(model(torch.randn(8, 3, 64, 64)), torch.randint(10, (8,))).backward()
    """
    return SelfDistillLoss(alpha=0.0, beta=0.0, label_loss=label_loss)
