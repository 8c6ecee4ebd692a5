"""One batch on its way through a network with exits."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model import SelfDistillModel
from .policy import Policy
from .row_dropping import AllGone, Route, keep_rows, run_with

WORTH_DROPPING = 1 / 16
"""Share of a batch that must be done before its rows are taken out: to copy the others costs as much for one row as for
many, and a batch one row smaller is hardly faster. From 1/32 to 1/8 it makes no difference that can be measured, 1/4 is
slower. An image that is done keeps its answer while it waits."""


class EarlyExitOutput(NamedTuple):
    """Answers in the order of the images.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import EarlyExit, wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> output = EarlyExit(model, thresholds=0.0).predict(torch.randn(4, 3, 64, 64))
        >>> output.exit
        tensor([0, 0, 0, 0])
    """

    logits: Tensor
    """(B, K), of the exit that each image took, as `SelfDistillModel.forward_exits` gives them."""
    exit: Tensor
    """(B,) integers, 0 (shallowest) to C - 1 (deepest)."""
    confidence: Tensor
    """(B,) probability of the most likely class there, after temperature scaling."""


class BatchRun:
    """Images x (B, in_chans, H, W) on their way; see `EarlyExit` for the rest.

    Args:
        thresholds: one for each shallow exit.
        temperatures: one for each exit.
    """

    def __init__(
        self,
        model: SelfDistillModel,
        x: Tensor,
        policy: Policy,
        thresholds: list[float | None],
        temperatures: list[float],
    ):
        self.model, self.x, self.policy = model, x, policy
        self.thresholds, self.temperatures = thresholds, temperatures
        self.rows: Tensor | None = None
        """Positions in the batch of the images that are still in the network; None is all."""
        self.done: Tensor | None = None
        """Which of these have their answer already; None is none."""
        self.waiting = 0
        """How many these are."""
        self.answers: list[tuple[Tensor | None, int, Tensor, Tensor]] = []
        """Positions (None is all), exit, logits and confidence of the images that left."""

    def run_stages(self, route: Route, owner: int) -> None:
        """Run the network stage by stage, until all images have left.

        Args:
            owner: of the network's `StageHook`s.
        """
        logits = run_with(owner, partial(self._reach_exit, route), self.model.backbone, self.x)
        if logits is not None:
            self._answer(len(self.thresholds), logits, None)

    def run_all(self) -> None:
        """Run the whole batch through the whole network; each image gets the answer of its exit."""
        *shallow, deepest = self.model.forward_exits(self.x, with_features=False).logits
        for exit, (logits, threshold) in enumerate(zip(shallow, self.thresholds)):
            if threshold is not None:
                self._answer(exit, logits, threshold)
        self._answer(len(shallow), deepest, None)

    def _reach_exit(self, route: Route, exit: int, output: Any) -> Any:
        """Let images leave at a shallow exit; the rows of `output` that go on, None for all.

        Raises:
            AllGone: all images have left.
        """
        threshold = self.thresholds[exit]
        if threshold is not None:
            logits, _ = self.model.run_head(exit, route.readers[exit](output))
            self._answer(exit, logits, threshold)
        if self.done is None:
            return None
        batch = len(self.done)
        if self.waiting == batch:
            raise AllGone
        if not route.droppable[exit] or self.waiting < WORTH_DROPPING * batch:
            return None
        stay = (~self.done).nonzero()[:, 0]
        self.rows = stay if self.rows is None else self.rows[stay]
        self.done, self.waiting = None, 0
        return keep_rows(output, stay, batch)

    def _answer(self, exit: int, logits: Tensor, threshold: float | None) -> None:
        """Record the answers of the images that leave: all where the threshold is None."""
        temperature = self.temperatures[exit]
        probabilities = (logits.float() if temperature == 1 else logits.float() / temperature).softmax(1)
        if threshold is not None:
            leaves = self.policy.leaves(probabilities, threshold)
            if self.done is not None:
                leaves &= ~self.done
        elif self.done is not None:
            leaves = ~self.done
        else:
            self.answers.append((self.rows, exit, logits, probabilities.amax(1)))
            return
        leaving = leaves.nonzero()[:, 0]
        if not len(leaving):
            return
        self.done = leaves if self.done is None else self.done | leaves
        self.waiting += len(leaving)
        if len(leaving) == len(leaves):
            self.answers.append((self.rows, exit, logits, probabilities.amax(1)))
        else:
            rows = leaving if self.rows is None else self.rows[leaving]
            self.answers.append((rows, exit, logits[leaving], probabilities[leaving].amax(1)))

    def output(self) -> EarlyExitOutput:
        """All answers, in the order of the images."""
        batch = len(self.x)
        rows, exit, first, confidence = self.answers[0]
        if rows is None:
            return EarlyExitOutput(first, torch.full((batch,), exit, device=first.device), confidence)
        output = EarlyExitOutput(
            first.new_empty(batch, first.shape[1]),
            torch.empty(batch, dtype=torch.long, device=first.device),
            torch.empty(batch, device=first.device),
        )
        for rows, exit, logits, confidence in self.answers:
            output.logits[rows], output.exit[rows], output.confidence[rows] = logits.to(first.dtype), exit, confidence
        return output
