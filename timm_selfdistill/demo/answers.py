"""What every exit says of a picture, and where the picture leaves for given thresholds."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from ..inference import EarlyExit
from ..inference.policy import check_thresholds, find_policy
from ..model import SelfDistillModel
from ..training.data.images import ValueRange, ValueRanges

EAGER, CAUTIOUS = 0.1, 0.9
"""Where the slider begins, as a part of its range: for thresholds that are entropies, and for others."""


@dataclass(frozen=True)
class Answers:
    """Of one picture.

    Attributes:
        image: as it was read, before it was made into the input of the network.
        probabilities: (C, K), a row for each exit, shallow to deep, after temperature scaling.
    """

    image: Image.Image
    probabilities: Tensor


class Leaving(NamedTuple):
    """Where a picture leaves the network."""

    exit: int
    shares: list[float]
    """For each exit, what a picture that leaves there costs, over the plain network's multiply-adds."""

    @property
    def share(self) -> float:
        return self.shares[self.exit]


class Classifier:
    """A model for one picture at a time, with the preprocessing that is saved with it.

    Args:
        model: in eval mode.
        value_range: black and white of pictures with more than 8 bits.
    """

    def __init__(self, model: SelfDistillModel, value_range: ValueRange | ValueRanges | None = None):
        self.model, self.value_range = model, value_range
        config = resolve_model_data_config(model)
        self.input_size: tuple[int, int, int] = config["input_size"]
        self.transform = create_transform(**config)
        self.early_exit = EarlyExit(model)
        self.costs = self.early_exit.find_costs("macs", torch.zeros(1, *self.input_size))

    @property
    def class_names(self) -> list[str]:
        names = self.model.pretrained_cfg.get("label_names")
        return list(names) if names else [f"class {index}" for index in range(self.model.num_classes)]

    @property
    def calibrated(self) -> list[float | None] | None:
        """The thresholds that are saved with the model, if there are any."""
        return self.early_exit.thresholds

    @property
    def highest(self) -> float:
        """The highest threshold of the model's policy."""
        return find_policy(self.early_exit.policy).highest(self.model.num_classes)

    @property
    def first_threshold(self) -> float:
        """Where the slider begins."""
        return self.highest * (CAUTIOUS if find_policy(self.early_exit.policy).sign > 0 else EAGER)

    def answer(self, image: Image.Image) -> Answers:
        """Run a picture through all exits."""
        with torch.no_grad():
            logits = self.model.forward_exits(self.transform(image)[None], with_features=False).logits
        rows = [row[0].double() / temperature for row, temperature in zip(logits, self.early_exit.temperatures)]
        return Answers(image, torch.stack(rows).softmax(1))

    def confidences(self, answers: Answers) -> list[float]:
        """What each exit's threshold is compared with, in the unit of the threshold."""
        policy = find_policy(self.early_exit.policy)
        return (policy.sign * policy.confidence(answers.probabilities)).tolist()

    def leave(self, answers: Answers, thresholds: list[float | None] | float) -> Leaving:
        """The exit that `EarlyExit` with these thresholds gives the picture, and the cost of every exit.

        Raises:
            ValueError: the thresholds do not fit the model.
        """
        policy = find_policy(self.early_exit.policy)
        checked = check_thresholds(thresholds, self.early_exit.policy, self.model)
        leaves = [
            threshold is not None and bool(policy.leaves(answers.probabilities[exit][None], threshold))
            for exit, threshold in enumerate(checked)
        ]
        paths = self.costs.paths([threshold is not None for threshold in checked])
        return Leaving([*leaves, True].index(True), (paths / self.costs.plain).tolist())
