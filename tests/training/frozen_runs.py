"""Short runs in which exits learn on a frozen backbone."""

import torch

from timm_selfdistill import SelfDistillLoss, SelfDistillModel, SelfDistillTask, TrainConfig, Trainer

from ..conftest import small_model


def frozen_model(name: str = "test_resnet", seed: int = 0, **kwargs) -> SelfDistillModel:
    torch.manual_seed(seed)
    return small_model(name, in_chans=1, freeze_backbone=True, **kwargs)


def fit(model: SelfDistillModel, data, output, criterion: SelfDistillLoss | None = None, **settings) -> Trainer:
    config = TrainConfig(
        output=str(output), warmup_epochs=0, seed=0, **{"epochs": 3, "batch_size": 40, "workers": 0, **settings}
    )
    trainer = Trainer(SelfDistillTask(model, criterion), *data, config)
    trainer.fit()
    return trainer


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
