"""What analyses of exits ask of a model."""

from torch import nn

from ..model import SelfDistillModel


def need_exits(model: nn.Module, analysis: str) -> SelfDistillModel:
    """The model, where it has several exits.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(model, SelfDistillModel):
        raise ValueError(
            f"{analysis} compares the exits of a SelfDistillModel, got {type(model).__name__}, which has one exit only;"
            " give it exits with wrap_self_distill(model), and train them"
        )
    return model
