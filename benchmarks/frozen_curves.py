"""Accuracy over compute of early exit: our calibration, and what thresholds give on test images."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_selfdistill import EarlyExit, SelfDistillModel
from timm_selfdistill.inference.calibration import Answers, Calibration, collect_logits
from timm_selfdistill.inference.thresholds import ExitCosts, simulate

BUDGETS = [step / 20 for step in range(5, 21)]
"""Mean multiply-adds of an image, of those of the network without exits: 25 % to 100 %."""
Thresholds = list[float | None]
"""One for each shallow exit, None where the exit is off."""


def our_curve(model: SelfDistillModel, calibration_data: Dataset, test_data: Dataset, seed: int) -> dict[str, Any]:
    """What `EarlyExit.calibrate` finds for every budget."""
    early_exit = EarlyExit(model)
    calibration = Calibration(model, early_exit.policy, batches(calibration_data), early_exit.find_costs, seed)
    costs = calibration.costs("macs")
    chosen = [calibration.find({"max_macs": budget * costs.plain}).thresholds for budget in BUDGETS]
    logits, labels, _ = collect_logits(model, batches(test_data))
    return measure(
        Answers.of(logits, labels, torch.arange(len(labels)), calibration.temperatures, early_exit.policy),
        chosen,
        costs,
    )


def measure(answers: Answers, chosen: list[Thresholds], costs: ExitCosts) -> dict[str, Any]:
    """Accuracy in per cent and mean share of the plain network's multiply-adds, heads included."""
    points = []
    for thresholds in chosen:
        exits, macs = simulate(answers.confidence, thresholds, costs)
        points.append({"share": float(macs.mean()) / costs.plain, "top1": top1(answers.right.gather(0, exits[None]))})
    return {
        "exit_top1": [top1(right) for right in answers.right],
        "points": points,
        "head_share": [macs / costs.plain for macs in costs.heads],
    }


def top1(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def batches(data: Dataset) -> DataLoader:
    return DataLoader(data, batch_size=256)
