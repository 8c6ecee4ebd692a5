"""Deeply-supervised knowledge synergy (DKS), CVPR 2019, arXiv:1906.00675."""

from torch import Tensor

from ..loss import LabelLoss, SelfDistillLoss, divergence
from ..memory import Remembered
from ..output import SelfDistillOutput
from .feature_maps import check_weight


class KnowledgeSynergyLoss(SelfDistillLoss):
    """Every classifier learns from the labels and from every other classifier.

    For the classifiers i = 1..C of a `SelfDistillModel`::

        loss = sum_i label_loss(z_i, y)  +  distill_loss_weight * sum_(i != j) KL(p_j || p_i),   p_i = softmax(z_i)

    The targets p_j carry no gradient. All weights are 1 in the paper and in the authors' code; the paper writes the
    second sum as a cross entropy, whose gradient is the same.

    Args:
        distill_loss_weight: of the second sum, >= 0.
        label_loss: as of `SelfDistillLoss`.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillTask, wrap_self_distill
        >>> from timm_selfdistill.baselines import KnowledgeSynergyLoss
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10))
        >>> task = SelfDistillTask(model, KnowledgeSynergyLoss()).train()
        >>> task(torch.randn(8, 3, 64, 64), torch.randint(10, (8,)))["loss"].backward()
    """

    def __init__(self, distill_loss_weight: float = 1.0, label_loss: LabelLoss | None = None):
        super().__init__(temperature=1.0, alpha=0.0, beta=0.0, label_loss=label_loss)
        check_weight("distill_loss_weight", distill_loss_weight)
        self.distill_loss_weight = distill_loss_weight

    @property
    def needs_features(self) -> bool:
        return False

    def terms(
        self, output: SelfDistillOutput, target: Tensor | None = None, remembered: Remembered | None = None
    ) -> dict[str, Tensor]:
        """The loss and its parts, `loss = label + distill_loss_weight * distill`: the two sums. The rest is as of
        `SelfDistillLoss`."""
        terms = super().terms(output, target, remembered)
        return {**terms, "loss": terms["label"] + self.distill_loss_weight * terms["distill"]}

    def _distill(self, logits: Tensor, remembered: Remembered | None = None) -> Tensor:
        # what one learns from itself is 0
        return sum((divergence(teacher, logits) for teacher in logits), logits.new_zeros(()))

    def extra_repr(self) -> str:
        return f"distill_loss_weight={self.distill_loss_weight}"
