"""FitNets: hints for thin deep nets, ICLR 2015, arXiv:1412.6550."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import move_alike
from ..loss import LabelLoss
from .feature_maps import FeatureMapTask, pair_stages


class FitNetTask(FeatureMapTask):
    """The middle feature map of a student learns to predict the teacher's, beside the labels.

    With the guided map v of the student, the hint u of the teacher and a regressor r (equation 3)::

        loss = task_loss_weight * CE(z, y) + distill_loss_weight * mean(u - r(v)) ^ 2

    Equation 3 is half the squared L2 distance: it is this mean times half the number of elements of u. Divided by it,
    the weight means the same for every network and image size. Guided and hint layer are the second of the four stages
    that `stages.choose_exits` finds. The regressor is a convolution without batch norm; the paper's kernel size, by
    which both maps get the same size, is 1 where they have it already, and others are refused. It is linear, so that it
    can match teachers of either sign. The paper first trains the lower half with the hint alone and then the network
    with KD; here hint and labels train in one stage. The regressor is in checkpoints, but no part of the saved model.

    Args:
        student, teacher, criterion, task_loss_weight: as of `FeatureMapTask`.
        distill_loss_weight: of the hint; 100 is that of arXiv:1910.10699, which compares with FitNets in one stage.

    Raises:
        TypeError: one of the models is no timm model.
        ValueError: their classes, channels or middle stages do not fit, or as of `FeatureMapTask`.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill.baselines import FitNetTask
        >>> student = timm.create_model("test_resnet", num_classes=10)
        >>> teacher = timm.create_model("resnet10t", num_classes=10)  # trained, in real life
        >>> task = FitNetTask(student, teacher, distill_loss_weight=10).train()
        >>> task(torch.randn(8, 3, 64, 64), torch.randint(10, (8,)))["loss"].backward()
        >>> task.get_eval_model() is student
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        criterion: LabelLoss | None = None,
        distill_loss_weight: float = 100.0,
        task_loss_weight: float = 1.0,
    ):
        pairs = pair_stages(student, teacher)
        guided, hint = pairs[(len(pairs) - 1) // 2]
        if guided.reduction != hint.reduction:
            raise ValueError(
                f"the maps in the middle have other sizes: {guided} of {type(student).__name__} is 1/{guided.reduction}"
                f" of the image's, {hint} of its teacher {type(teacher).__name__} 1/{hint.reduction}; take a teacher of"
                " the same resolution, or attention transfer, which resizes"
            )
        regressor = nn.Conv2d(guided.channels, hint.channels, 1)
        move_alike(regressor, student)
        super().__init__(
            student,
            teacher,
            [(guided, hint)],
            regressor,
            compare_hints,
            criterion,
            distill_loss_weight,
            task_loss_weight,
        )


def compare_hints(maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
    """Mean squared difference of one map and its hint."""
    (guided,), (hint,) = maps, teacher_maps
    if guided.shape != hint.shape:
        raise ValueError(
            f"the student's map {tuple(guided.shape)} and the teacher's {tuple(hint.shape)} cannot be"
            " compared; take images whose size both networks divide alike, e.g. a multiple of 32"
        )
    return F.mse_loss(guided, hint)
