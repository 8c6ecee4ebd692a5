"""earlyon's exits on a frozen network, and its calibration at its best."""

import warnings
from functools import cache
from typing import Any
from unittest import mock

import torch
from earlyon.core import thresholds as earlyon
from earlyon.core.wrappers import EarlyExitWrapper
from earlyon.models import custom_ee
from earlyon.training import stage2_train_exits
from frozen_curves import BUDGETS, Thresholds, batches, measure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from timm_selfdistill.cost import count_cost
from timm_selfdistill.inference.calibration import Answers
from timm_selfdistill.inference.thresholds import ExitCosts

FINE_GRID = tuple((1 - torch.logspace(-4, -0.05, 60, dtype=torch.double)).tolist())
"""Confidences for earlyon to try, besides its own nine."""
DROPS = [step / 200 for step in range(31)]
"""Of the accuracy: earlyon's other kind of budget, 0 to 15 points."""


class StoredMaps(nn.Module):
    """Stands in for a frozen network: hands its feature maps, which are the input, to the exits, and gives its logits.

    Args:
        shapes: of the maps, (C, H, W), and of the logits, (K,).
    """

    def __init__(self, shapes: list[torch.Size]):
        super().__init__()
        self.shapes = shapes
        self.stages = nn.ModuleList(nn.Identity() for _ in shapes[:-1])

    def forward(self, x: Tensor) -> Tensor:
        *maps, logits = x.split([shape.numel() for shape in self.shapes], 1)
        for stage, part, shape in zip(self.stages, maps, self.shapes):
            stage(part.unflatten(1, shape))
        return logits


def train_exits(model: EarlyExitWrapper, data: Dataset, batch_size: int, epochs: int) -> None:
    """`stage2_train_exits`, but the frozen network runs only once; the weights are the same up to rounding."""
    maps, labels = [], []
    for x, y in batches(data):
        parts = maps_and_logits(model, x)
        maps.append(torch.cat([part.flatten(1) for part in parts], 1))
        labels.append(y)
    shapes = [part.shape[1:] for part in parts]
    network = StoredMaps(shapes)
    stand_in = custom_ee(
        network,
        [f"stages.{exit}" for exit in range(len(network.stages))],
        shapes[-1].numel(),
        input_shape=(1, maps[0].shape[1]),
    )
    stand_in.exit_heads = model.exit_heads
    loader = DataLoader(TensorDataset(torch.cat(maps), torch.cat(labels)), batch_size, shuffle=True)
    stage2_train_exits(stand_in, loader, epochs=epochs, lr=1e-3, on_epoch_end=lambda log: None)


def maps_and_logits(model: EarlyExitWrapper, x: Tensor) -> list[Tensor]:
    """What the heads take (B, C, H, W), and what the network answers (B, K), to images x."""
    maps: list[Tensor] = []
    hooks = [
        head.register_forward_pre_hook(lambda head, inputs: maps.append(inputs[0]))
        for head in model.exit_heads.values()
    ]
    with torch.no_grad():
        *_, logits = model(x, mode="training")
    for hook in hooks:
        hook.remove()
    return [*maps, logits]


def earlyon_curve(
    model: EarlyExitWrapper,
    stage_macs: list[float],
    calibration_data: Dataset,
    test_data: Dataset,
    seed: int,
) -> dict[str, Any]:
    """For every budget the most accurate of all policies that earlyon's calibrators find and that keep it.

    A third of the calibration images is for its temperatures, the rest for thresholds.

    Args:
        stage_macs: of the network without heads, up to each exit.
    """
    costs = ExitCosts(stage_macs, head_macs(model, test_data), list(range(len(stage_macs) - 1)))
    order = torch.randperm(len(calibration_data), generator=torch.Generator().manual_seed(seed))
    for_temperatures, *rest = order.tensor_split(3)
    cached = earlyon.collect_head_logits(model, batches(Subset(calibration_data, for_temperatures.tolist())), "cpu")
    model.config.temperatures = {name: fit.temperature for name, fit in earlyon.fit_head_temperatures(cached).items()}
    loader = batches(Subset(calibration_data, torch.cat(rest).tolist()))
    with mock.patch.object(earlyon, "collect_head_logits", cache(earlyon.collect_head_logits)):
        policies = earlyon_policies(model, loader)
        found = answers_of(model, earlyon.collect_head_logits(model, loader, "cpu"))
    points = measure(found, policies, costs)["points"]
    chosen = []
    for budget in BUDGETS:
        within = [index for index, point in enumerate(points) if point["share"] <= budget]
        best = (
            max(within, key=lambda index: points[index]["top1"])
            if within
            else min(range(len(points)), key=lambda index: points[index]["share"])
        )
        chosen.append(policies[best])
    return measure(answers_of(model, earlyon.collect_head_logits(model, batches(test_data), "cpu")), chosen, costs)


def earlyon_policies(model: EarlyExitWrapper, loader: DataLoader) -> list[Thresholds]:
    """What its two calibrators find, with its own grid of thresholds and with a fine one."""
    policies: list[Thresholds] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # budgets that it cannot reach
        for grid in (earlyon.DEFAULT_GRID, FINE_GRID):
            for calibrate, budgets in (
                (earlyon.calibrate_thresholds_for_budget, BUDGETS),
                (earlyon.calibrate_thresholds, DROPS),
            ):
                for budget in budgets:
                    result = calibrate(model, loader, budget, grid=grid)
                    policies.append(
                        [
                            threshold if enabled else None
                            for threshold, enabled in zip(result.thresholds, result.enabled_exits)
                        ]
                    )
    return policies


def answers_of(model: EarlyExitWrapper, cached: earlyon.HeadLogits) -> Answers:
    temperatures = [model.config.temperatures[name] for name in cached.head_names]
    rows = torch.arange(len(cached.targets))
    return Answers.of(cached.logits, cached.targets, rows, temperatures, "confidence")


def head_macs(model: EarlyExitWrapper, data: Dataset) -> list[float]:
    """Multiply-adds of each of earlyon's heads."""
    maps = maps_and_logits(model, data[0][0][None])[:-1]
    return [count_cost(head, part.shape[1:]).macs for head, part in zip(model.exit_heads.values(), maps)]
