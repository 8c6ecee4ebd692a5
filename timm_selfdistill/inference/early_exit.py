"""Easy images leave a network early, hard ones go on."""

import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from copy import copy
from itertools import count
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import memory_per_image
from ..model import SelfDistillModel
from .batch_run import BatchRun, EarlyExitOutput
from .calibration import Calibration, check_budget, macs_of_exits, times_of_exits
from .calibration_report import CalibrationReport
from .labelled import check_images
from .policy import check_temperatures, check_thresholds, find_policy
from .row_dropping import Route, StageHook, add_hook, find_route
from .thresholds import ExitCosts

PIECE_BYTES = 32 * 2**20
"""Memory for the feature maps of each thread: a CPU takes as many images of a batch at once as fit. With more, glibc
gives the memory back to the system after one layer and takes it again for the next, which takes longer than many a
layer (ResNet50 at 224 px on one core: 90 ms for an image in a batch of 32, 55 ms in one of 3); with fewer, what is left
of the images in the last stages is too few to be fast."""

_owners = count(1)


class EarlyExit:
    """Inference in which every image leaves at the first exit that is confident enough.

    In a batch, images that are done leave it at their stage and the rest go on; no layer runs twice. Whether the layers
    behind give the others the same logits then is tried for every image size, with a handful of random images (at
    construction for the size that the model was made for); where they would not, the whole batch runs on, only the
    answers are taken early, and there is one warning. Calls from several threads are fine, also within
    `torch.inference_mode()`. It can be copied and pickled; `copy.copy` shares the model, `copy.deepcopy` copies it too.

    Args:
        model: in eval mode; stays as it is.
        thresholds: one for each shallow exit, or one number for all; None for an exit that nobody takes (its head does
            not run). Left out, the model's own, which `calibrate` found and which are saved with it; policy and
            temperatures then come with them.
        policy: "confidence": an image leaves where its most likely class has at least the threshold's probability;
            "entropy": where the entropy of the probabilities is at most the threshold, in nats; "margin": where the two
            most likely classes are at least the threshold apart.
        temperatures: one for each of the C exits, by which its logits are divided before the softmax.

    Raises:
        TypeError: `model` is no SelfDistillModel.
        ValueError: the model is in training mode, or thresholds, policy or temperatures do not fit it.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import EarlyExit, wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> early_exit = EarlyExit(model, thresholds=[0.9, 0.9, 0.9])
        >>> logits, exit, confidence = early_exit.predict(torch.randn(8, 3, 64, 64))
        >>> logits.shape, exit.shape
        (torch.Size([8, 10]), torch.Size([8]))
    """

    def __init__(
        self,
        model: SelfDistillModel,
        thresholds: Sequence[float | None] | float | None = None,
        policy: str | None = None,
        temperatures: Sequence[float] | None = None,
    ):
        if not isinstance(model, SelfDistillModel):
            raise TypeError(
                f"expected a SelfDistillModel, which has several exits, got {type(model).__name__}; make one with"
                " wrap_self_distill"
            )
        _check_mode(list(model.modules()))
        saved = model.early_exit or {}
        if thresholds is None and policy in (None, saved.get("policy")):
            policy, thresholds = saved.get("policy"), saved.get("thresholds")
            temperatures = saved.get("temperatures") if temperatures is None else temperatures
        self.model = model
        self.policy = "confidence" if policy is None else policy
        find_policy(self.policy)
        self.thresholds = None if thresholds is None else check_thresholds(thresholds, self.policy, model)
        self.temperatures = check_temperatures(temperatures, model)

        self._warned = False
        self._connect()
        self._route(model.input_size)

    def _connect(self) -> None:
        """Put this object's hooks on the model."""
        self._parts = list(self.model.modules())  # so that looking at them for each batch takes no time
        self._owner, self._lock = next(_owners), threading.Lock()
        self._routes: dict[tuple[int, ...], Route | None] = {}
        self._bytes: dict[tuple[int, ...], int] = {}
        """Of an image of a size: the memory that its feature maps need."""
        modules = dict(self.model.backbone.named_modules())
        for exit, stage in enumerate(self.model.stages):
            if stage.name in modules:
                handle = add_hook(modules[stage.name], StageHook(exit, self._owner))
                weakref.finalize(self, handle.remove)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: all but the hooks on the model and what was found with them."""
        return {
            "model": self.model,
            "policy": self.policy,
            "thresholds": copy(self.thresholds),
            "temperatures": list(self.temperatures),
            "_warned": self._warned,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def predict(self, x: Tensor) -> EarlyExitOutput:
        """Answers for images (B, in_chans, H, W), without gradients.

        Raises:
            ValueError: there are no thresholds, the model is in training mode, or it does not take such images.
        """
        if self.thresholds is None:
            raise ValueError(
                "there are no thresholds: pass EarlyExit(model, thresholds=[...]), or find them with calibrate(loader)"
            )
        _check_mode(self._parts)
        check_images(self.model, x, known_size=getattr(x, "shape", ())[1:] in self._routes)
        with torch.no_grad():
            size = tuple(x.shape[1:])
            route = self._route(size) if len(x) else None
            outputs = []
            for piece in x.split(_piece(x, self._bytes[size]) if len(x) else 1):
                run = BatchRun(self.model, piece, find_policy(self.policy), self.thresholds, self.temperatures)
                if route is None:
                    run.run_all()
                else:
                    run.run_stages(route, self._owner)
                outputs.append(run.output())
        return outputs[0] if len(outputs) == 1 else EarlyExitOutput(*map(torch.cat, zip(*outputs)))

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
        likeliest, on the second the thresholds are found (that keep the promise by two standard errors), the third
        shows whether it is kept. If it is, they become this object's, and the model's: `save_pretrained` writes them to
        config.json. If not, nothing changes; the report has the nearest that there is.

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

        Examples:
            >>> import timm, torch
            >>> from timm_selfdistill import EarlyExit, wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
            >>> held_out = [(torch.randn(60, 3, 32, 32), torch.randint(10, (60,))) for _ in range(5)]
            >>> report = EarlyExit(model).calibrate(held_out, max_macs=1e9)
            >>> len(report.thresholds), len(report.temperatures)
            (3, 4)
        """
        _check_mode(self._parts)
        budget = check_budget(
            {"max_accuracy_drop": max_accuracy_drop, "max_macs": max_macs, "min_speedup": min_speedup}
        )
        report = Calibration(self.model, self.policy, loader, self.find_costs, seed).find(budget)
        if report.met:
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
        channels, height, width = x.shape[1:]
        return macs_of_exits(self.model, stops, (channels, height, width))

    def _route(self, size: tuple[int, ...]) -> Route | None:
        """How images (in_chans, H, W) go through the model; None where its stages cannot be read."""
        if size in self._routes:
            return self._routes[size]
        with self._lock:
            if size not in self._routes:
                route = find_route(self.model, self._owner, size)
                like = next(p for p in self.model.parameters() if p.is_floating_point())
                with torch.inference_mode(False), torch.autocast(like.device.type, enabled=False):
                    self._bytes[size] = memory_per_image(self.model.backbone, like.new_zeros(2, *size))
                self._routes[size] = route
                kept = (
                    range(len(self.model.stages))
                    if route is None
                    else [exit for exit, droppable in enumerate(route.droppable) if not droppable]
                )
                if len(kept) and not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"{type(self.model.backbone).__name__}: images cannot leave a batch at"
                        f" {', '.join(self.model.exits[exit] for exit in kept)}; they get their answers there, but"
                        " cost as much as the others",
                        stacklevel=3,
                    )
            return self._routes[size]


def _piece(x: Tensor, bytes_each: int) -> int:
    """How many of the images (B, C, H, W) are taken at once: on a CPU as many as fit, in pieces as equal as can be."""
    if x.device.type != "cpu":
        return len(x)
    most = max(1, PIECE_BYTES // max(1, bytes_each)) * torch.get_num_threads()
    return ceil(len(x) / ceil(len(x) / most))


def _check_mode(parts: list[nn.Module]) -> None:
    if any(part.training for part in parts):
        raise ValueError("the model is in training mode; call model.eval() first")
