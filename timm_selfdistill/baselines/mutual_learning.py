"""Deep mutual learning (DML), CVPR 2018, arXiv:1706.00384."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import group_parameters
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..loss import LabelLoss, bounded, divergence, full_precision
from ..timm_model import as_timm
from .feature_maps import check_teacher, check_weight


class MutualLearningTask(ClassificationTask):
    """Two networks learn from the labels and from each other.

    For the logits z_1 of the student and z_2 of its peer::

        loss = CE(z_1, y) + CE(z_2, y) + distill_loss_weight * (KL(p_2 || p_1) + KL(p_1 || p_2)),   p = softmax(z)

    The first distribution of each KL carries no gradient, so each network gets the gradient of its own loss in the
    paper. The paper updates the networks in turn, here one update is of both. The student is evaluated and saved, the
    peer is in checkpoints only.

    Args:
        student: a timm model.
        peer: another for the same images and classes, of other first weights; of the same architecture or not.
        criterion: `(logits, target) -> scalar`; None is cross entropy.
        distill_loss_weight: of the divergences, >= 0; 1 in the paper.

    Raises:
        TypeError, ValueError: the two do not fit, or have the same weights.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill.baselines import MutualLearningTask
        >>> student, peer = (timm.create_model("test_resnet", num_classes=10) for _ in range(2))
        >>> task = MutualLearningTask(student, peer).train()
        >>> task(torch.randn(8, 3, 64, 64), torch.randint(10, (8,)))["loss"].backward()
        >>> task.get_eval_model() is student
        True
    """

    def __init__(
        self, student: nn.Module, peer: nn.Module, criterion: LabelLoss | None = None, distill_loss_weight: float = 1.0
    ):
        check_teacher(student, peer, "peer")
        check_weight("distill_loss_weight", distill_loss_weight)
        _check_different(student, peer)
        device = next(student.parameters()).device
        criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        super().__init__(Peers(student, peer), criterion, device=device, verbose=False)
        self.distill_loss_weight = distill_loss_weight

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Run both networks and the loss.

        Args:
            input: images (B, in_chans, H, W).
            target: class indices (B,) or soft labels (B, K).

        Returns:
            "loss", "task_loss", "kd_loss" (scalars; the parts are sums over both networks) and "output", the student's
            logits (B, K).
        """
        own, peers = (bounded(full_precision(z)) for z in self.trainable_module(input))
        task_loss = self.criterion(own, target) + self.criterion(peers, target)
        kd_loss = divergence(peers, own) + divergence(own, peers)
        loss = task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": own, "task_loss": task_loss, "kd_loss": kd_loss}

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The student alone."""
        model = super().get_eval_model(module, ema)
        pair = unwrap_model(model)
        return pair.student if isinstance(pair, Peers) else model

    def compile(  # type: ignore[override]  # torch's own returns nothing, and timm's overrides it so
        self, backend: str = "inductor", mode: str | None = None, **settings: Any
    ) -> nn.Module:
        student = unwrap_model(self.trainable_module).student
        self.eval_model = _compiled(student, backend=backend, mode=mode, **settings)
        self.trainable_module = _compiled(self.trainable_module, backend=backend, mode=mode, **settings)
        return self.eval_model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        module = self.get_trainable_module(ema) if module is None else module
        return {} if module is None else {"peer": unwrap_model(module).peer.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        if state:
            module = self.get_trainable_module(ema) if module is None else module
            unwrap_model(module).peer.load_state_dict(state["peer"], strict=strict)


class Peers(nn.Module):
    """Two networks that see the same images: (B, in_chans, H, W) to the logits (B, K) of each."""

    def __init__(self, student: nn.Module, peer: nn.Module):
        super().__init__()
        self.student, self.peer = student, peer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.student(x), self.peer(x)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay."""
        return {
            f"{name}.{parameter}"
            for name, model in self.named_children()
            for parameter in getattr(model, "no_weight_decay", set)()
        }

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layers in groups, for timm's layer-wise learning rates; those of the two networks are counted apart, so that
        both classifiers are in the last group."""
        groups = {
            name: group_parameters(model, as_timm(model).group_matcher(coarse), reverse=True)
            for name, model in self.named_children()
        }
        last = max(max(own.values()) for own in groups.values())
        aligned = {
            f"{name}.{parameter}": group + last - max(own.values())
            for name, own in groups.items()
            for parameter, group in own.items()
        }
        return aligned.__getitem__


def _compiled(module: nn.Module, **settings: Any) -> nn.Module:
    return torch.compile(module, **settings)  # type: ignore[return-value]  # torch declares a function


def _check_different(student: nn.Module, peer: nn.Module) -> None:
    own, others = student.state_dict(), peer.state_dict()
    if own.keys() == others.keys() and all(
        own[key].shape == others[key].shape and torch.equal(own[key], others[key]) for key in own
    ):
        raise ValueError(
            "student and peer have the same weights, so neither has anything to teach the other; at least"
            " their classifiers must begin with other values"
        )
