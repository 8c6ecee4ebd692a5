"""Attention transfer (AT), ICLR 2017, arXiv:1612.03928."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..loss import LabelLoss
from .feature_maps import FeatureMapTask, pair_stages


class AttentionTransferTask(FeatureMapTask):
    """A student learns where its teacher's features are strong, beside the labels.

    With the attention Q = vec(sum_c A_c^2) of a feature map A, over the stages j and a mean over batch and positions::

        loss = task_loss_weight * CE(z, y)  +  distill_loss_weight * sum_j mean (Q_S/||Q_S|| - Q_T/||Q_T||)^2

    That is the authors' code. Equation 2 has beta/2 times the norm, not squared, which has no gradient where the maps
    are equal; the square has. The stages are those of `stages.choose_exits`, one by one; where the sizes differ the
    teacher's attention is averaged down, or interpolated up, to the student's.

    Args:
        student, teacher, criterion, task_loss_weight: as of `FeatureMapTask`.
        distill_loss_weight: of the attention; 1000 is the authors'.

    Raises:
        TypeError: one of the models is no timm model.
        ValueError: their classes, channels or numbers of stages do not fit, or as of `FeatureMapTask`.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill.baselines import AttentionTransferTask
        >>> student = timm.create_model("test_resnet", num_classes=10)
        >>> teacher = timm.create_model("resnet10t", num_classes=10)  # trained, in real life
        >>> task = AttentionTransferTask(student, teacher, distill_loss_weight=100).train()
        >>> task(torch.randn(8, 3, 64, 64), torch.randint(10, (8,)))["loss"].backward()
        >>> task.get_eval_model() is student
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        criterion: LabelLoss | None = None,
        distill_loss_weight: float = 1000.0,
        task_loss_weight: float = 1.0,
    ):
        pairs = pair_stages(student, teacher)
        super().__init__(
            student, teacher, pairs, None, compare_attention, criterion, distill_loss_weight, task_loss_weight
        )


def compare_attention(maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
    """Mean squared difference of the attention, summed over the stages."""
    losses = (
        F.mse_loss(attention(own), attention(teacher, (own.shape[2], own.shape[3])))
        for own, teacher in zip(maps, teacher_maps, strict=True)
    )
    return sum(losses, maps[0].new_zeros(()))


def attention(feature: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """The attention (B, H * W), of unit length, in a feature map (B, D, H, W), at another size (H, W) where one is
    given."""
    strength = feature.square().sum(1, keepdim=True)
    if size is not None and strength.shape[2:] != size:
        smaller = all(new <= old for new, old in zip(size, strength.shape[2:]))
        strength = (
            F.adaptive_avg_pool2d(strength, size)
            if smaller  # interpolation would pass over pixels
            else F.interpolate(strength, size, mode="bilinear")
        )
    return F.normalize(strength.flatten(1))
