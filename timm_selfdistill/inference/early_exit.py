"""Easy images leave a network early, hard ones go on."""
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cost import default_input_size
from ..model import SelfDistillModel
from ..stages import explain_misfit
from .calibration import CalibrationReport, calibrate, macs_of_exits, times_of_exits
from .policy import find_policy
from .row_dropping import AllGone, Route, StageHook, find_route, keep_rows, run_with
from .thresholds import ExitCosts

WORTH_DROPPING = 1 / 16
"""Share of a batch that must be done before its rows are taken out: to copy the others costs as much for one row as for
many, and a batch one row smaller is hardly faster. An image that is done keeps its answer while it waits."""

_owners = count(1)


class EarlyExitOutput(NamedTuple):
    """Answers in the order of the images."""

    logits: Tensor
    """(B, K), of the exit that each image took, as `SelfDistillModel.forward_exits` gives them."""
    exit: Tensor
    """(B,) integers, 0 (shallowest) to C - 1 (deepest)."""
    confidence: Tensor
    """(B,) probability of the most likely class there, after temperature scaling."""


class EarlyExit:
    """Inference in which every image leaves at the first exit that is sure enough of it.

    In a batch, images that are done leave it at their stage and the rest go on; no layer runs twice. Whether the layers
    behind give the others the same logits then is tried for every image size, with a handful of random images (at
    construction for the size that the model was made for); where they would not, the whole batch runs on, only the
    answers are taken early, and there is one warning. Calls from several threads are fine.

    Args:
        model: in eval mode; stays as it is.
        thresholds: one for each shallow exit, or one number for all; None for an exit that nobody takes (its head does
            not run). Left out, the model's own, which `calibrate` found and which are saved with it.
        policy: "confidence": an image leaves where its most likely class has at least the threshold's probability;
            "entropy": where the entropy of the probabilities is at most the threshold, in nats; "margin": where the two
            most likely classes are at least the threshold apart.
        temperatures: one for each of the C exits, by which its logits are divided before the softmax.

    Raises:
        TypeError: `model` is no SelfDistillModel.
        ValueError: the model is in training mode, or thresholds, policy or temperatures do not fit it.
    """

    def __init__(
            self,
            model: SelfDistillModel,
            thresholds: Sequence[float | None] | float | None = None,
            policy: str | None = None,
            temperatures: Sequence[float] | None = None,
    ):
        if not isinstance(model, SelfDistillModel):
            raise TypeError(f"expected a SelfDistillModel, got {type(model).__name__}; make one with wrap_self_distill")
        _check_mode(model)
        saved = model.early_exit or {}
        if thresholds is None and policy in (None, saved.get("policy")):
            policy, thresholds = saved.get("policy"), saved.get("thresholds")
            temperatures = saved.get("temperatures") if temperatures is None else temperatures
        self.model = model
        self.policy = "confidence" if policy is None else policy
        find_policy(self.policy)
        self.thresholds = None if thresholds is None else check_thresholds(thresholds, self.policy, model)
        self.temperatures = check_temperatures(temperatures, model)

        self._owner, self._routes, self._lock = next(_owners), {}, threading.Lock()
        modules = dict(model.backbone.named_modules())
        handles = [modules[stage.name].register_forward_hook(StageHook(exit, self._owner))
                   for exit, stage in enumerate(model.stages) if stage.name in modules]
        weakref.finalize(self, _remove, handles)
        self._route(default_input_size(model.backbone, model.model_args))

    def predict(self, x: Tensor) -> EarlyExitOutput:
        """Answers for images (B, in_chans, H, W), without gradients.

        Raises:
            ValueError: there are no thresholds, the model is in training mode, or it does not take such images.
        """
        self._check(x)
        run = _Run(self, x)
        with torch.no_grad():
            route = self._route(tuple(x.shape[1:])) if len(x) else None
            if route is None:
                run.answer_all()
            else:
                run.go(route)
        return run.output()

    def calibrate(
            self,
            loader: Iterable[tuple[Tensor, Tensor]],
            *,
            max_accuracy_drop: float | None = None,
            max_macs: float | None = None,
            min_speedup: float | None = None,
            seed: int = 0,
    ) -> CalibrationReport:
        """Find temperatures and thresholds that keep one promise, on images that the network was not trained with.

        The images are split in three at random: on the first part each exit gets the temperature that makes the labels
        likeliest, on the second the thresholds are found, the third shows whether the promise is kept. They become this
        object's, and the model's: `save_pretrained` writes them to config.json.

        Args:
            loader: gives (images (B, C, H, W), class indices (B,)); at least 300 images.
            max_accuracy_drop: points of top-1 below the deepest exit, as cheap as may be.
            max_macs: mean multiply-adds of an image, as accurate as may be.
            min_speedup: of the mean time of an image over the plain network's, by the measured times of the exits, as
                accurate as may be.
            seed: of the split.

        Returns:
            A report, which says whether the promise is kept; a printable table.

        Raises:
            ValueError: not just one promise is asked for, or it makes no sense; too few images, of one class, or with
                labels out of range; the model is in training mode.
        """
        _check_mode(self.model)
        budget = {"max_accuracy_drop": max_accuracy_drop, "max_macs": max_macs, "min_speedup": min_speedup}
        report = calibrate(self.model, self.policy, loader, self.find_costs, budget, seed)
        self.thresholds, self.temperatures = report.thresholds, report.temperatures
        self.model.early_exit = report.to_dict()
        return report

    def find_costs(self, unit: str, x: Tensor) -> ExitCosts:
        """What images like x (B, C, H, W) cost: "macs" or "time"."""
        with torch.no_grad():
            route = self._route(tuple(x.shape[1:]))
        exits = len(self.model.stages)
        droppable = route.droppable if route else [False] * exits
        stops = [next((stop for stop in range(exit, exits) if droppable[stop]), exits) for exit in range(exits)]
        if unit == "time":
            return times_of_exits(self.model, stops, x)
        return macs_of_exits(self.model, stops, tuple(x.shape[1:]))

    def _check(self, x: Tensor) -> None:
        model = self.model
        if self.thresholds is None:
            raise ValueError(
                "there are no thresholds: pass EarlyExit(model, thresholds=[...]), or find them with calibrate(loader)")
        _check_mode(model)
        if not isinstance(x, Tensor):
            raise ValueError(f"expected images as a tensor (B, C, H, W), got {type(x).__name__}")
        if x.shape[1:] not in self._routes and (misfit := explain_misfit(model.backbone, x, model.model_args)):
            raise ValueError(misfit)
        like = next(p for p in model.parameters() if p.is_floating_point())
        if x.device != like.device or (x.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type)):
            raise ValueError(
                f"the images are {x.dtype} on {x.device}, the model's weights {like.dtype} on {like.device};"
                " convert the images with x.to(...)")

    def _route(self, size: tuple[int, ...]) -> Route | None:
        """How images (in_chans, H, W) go through the model; None where its stages cannot be read."""
        if size in self._routes:
            return self._routes[size]
        with self._lock:
            if size not in self._routes:
                self._routes[size] = route = find_route(self.model, self._owner, size)
                kept = range(len(self.model.stages)) if route is None else [
                    exit for exit, droppable in enumerate(route.droppable) if not droppable]
                if len(kept):
                    warnings.warn(
                        f"{type(self.model.backbone).__name__}: images cannot leave a batch at"
                        f" {', '.join(self.model.exits[exit] for exit in kept)}; they get their answers there, but"
                        " cost as much as the others", stacklevel=4)
            return self._routes[size]


class _Run:
    """One batch on its way."""

    def __init__(self, early_exit: EarlyExit, x: Tensor):
        self.early_exit, self.x = early_exit, x
        self.policy = find_policy(early_exit.policy)
        self.rows: Tensor | None = None
        """Positions in the batch of the images that are still in the network; None is all."""
        self.done: Tensor | None = None
        """Which of these have their answer already; None is none."""
        self.answers: list[tuple[Tensor | None, int, Tensor, Tensor]] = []
        """Positions (None is all), exit, logits and confidence of those who left."""

    def go(self, route: Route) -> None:
        """Through the network, as far as it takes."""
        logits = run_with(
            self.early_exit._owner, lambda exit, output: self._pass(exit, output, route),
            self.early_exit.model.backbone, self.x)
        if logits is not None:
            self._leave(len(route.to_maps), logits, None)

    def answer_all(self) -> None:
        """The whole batch runs through the whole network, and each image gets the answer of its exit."""
        for exit, logits in enumerate(self.early_exit.model.forward_exits(self.x).logits):
            threshold = self._threshold(exit)
            if exit == len(self.early_exit.model.stages) or threshold is not None:
                self._leave(exit, logits, threshold)

    def _threshold(self, exit: int) -> float | None:
        return None if exit == len(self.early_exit.thresholds) else self.early_exit.thresholds[exit]

    def _pass(self, exit: int, output: Any, route: Route) -> Any:
        """Let images leave at a shallow exit; what goes on, where it is not all of `output`.

        Raises:
            AllGone: nothing.
        """
        threshold = self.early_exit.thresholds[exit]
        if threshold is None:
            return None
        logits, _ = self.early_exit.model.heads[exit](route.to_maps[exit](output))
        self._leave(exit, logits, threshold)
        if self.done is None:
            return None
        batch, done = len(self.done), int(self.done.sum())
        if done == batch:
            raise AllGone
        if not route.droppable[exit] or done < WORTH_DROPPING * batch:
            return None
        stay = (~self.done).nonzero()[:, 0]
        self.rows = stay if self.rows is None else self.rows[stay]
        self.done = None
        return keep_rows(output, stay, batch)

    def _leave(self, exit: int, logits: Tensor, threshold: float | None) -> None:
        """Keep the answers of those who may leave, all of them where the threshold is None."""
        probabilities = (logits.float() / self.early_exit.temperatures[exit]).softmax(1)
        leaves = None if threshold is None else self.policy.leaves(probabilities, threshold)
        if self.done is not None:
            leaves = ~self.done if leaves is None else leaves & ~self.done
        confidence = probabilities.amax(1)
        if leaves is None:
            self.answers.append((self.rows, exit, logits, confidence))
            return
        leaving = leaves.nonzero()[:, 0]
        if len(leaving):
            self.done = leaves if self.done is None else self.done | leaves
            rows = leaving if self.rows is None else self.rows[leaving]
            self.answers.append((rows, exit, logits[leaving], confidence[leaving]))

    def output(self) -> EarlyExitOutput:
        batch = len(self.x)
        rows, _, first, _ = self.answers[0]
        if rows is None:
            rows, exit, logits, confidence = self.answers[0]
            return EarlyExitOutput(logits, torch.full((batch,), exit, device=logits.device), confidence)
        output = EarlyExitOutput(
            first.new_empty(batch, first.shape[1]), torch.empty(batch, dtype=torch.long, device=first.device),
            torch.empty(batch, device=first.device))
        for rows, exit, logits, confidence in self.answers:
            output.logits[rows], output.exit[rows], output.confidence[rows] = logits.to(first.dtype), exit, confidence
        return output


def check_thresholds(
        thresholds: Sequence[float | None] | float, policy: str, model: SelfDistillModel) -> list[float | None]:
    """One threshold for each shallow exit.

    Raises:
        ValueError: there are too few or too many, or one is no number in the policy's range.
    """
    exits, highest = len(model.stages), find_policy(policy).highest(model.num_classes)
    if isinstance(thresholds, (int, float)) and not isinstance(thresholds, bool):
        thresholds = [thresholds] * exits
    if isinstance(thresholds, (str, bytes)) or not isinstance(thresholds, Sequence) or len(thresholds) != exits:
        raise ValueError(f"expected {exits} thresholds, one for each shallow exit, got {thresholds!r}")
    for threshold in thresholds:
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if threshold is not None and not (number and 0 <= threshold <= highest + 1e-6):
            raise ValueError(
                f"a threshold of the policy {policy!r} is a number from 0 to {highest:.4g}, or None for an exit that"
                f" nobody takes, got {threshold!r}")
    return list(thresholds)


def check_temperatures(temperatures: Sequence[float] | None, model: SelfDistillModel) -> list[float]:
    """One temperature for each exit; 1 where None is given.

    Raises:
        ValueError: there are too few or too many, or one is no number above 0.
    """
    exits = len(model.exits)
    if temperatures is None:
        return [1.0] * exits
    if isinstance(temperatures, (str, bytes)) or not isinstance(temperatures, Sequence) or len(temperatures) != exits:
        raise ValueError(f"expected {exits} temperatures, one for each exit, got {temperatures!r}")
    for value in temperatures:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"a temperature is a number above 0, got {value!r}")
    return list(temperatures)


def _check_mode(model: SelfDistillModel) -> None:
    if model.training or model.backbone.training or model.heads.training:
        raise ValueError("the model is in training mode; call model.eval() first")


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
