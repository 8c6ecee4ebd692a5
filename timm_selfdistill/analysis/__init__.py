"""The paper's explanations, measured on a model and data of your own."""

from .agreement import AgreementReport, compare_answers, measure_agreement, plot_agreement
from .flat_minima import FlatMinimaReport, measure_flatness, plot_flatness, sweep_noise
from .gradients import (
    GradientReport,
    find_sections,
    measure_gradients,
    plot_gradient_history,
    plot_gradients,
    section_gradients,
)
from .separability import SeparabilityReport, measure_separability, plot_separability

__all__ = [
    "AgreementReport",
    "FlatMinimaReport",
    "GradientReport",
    "SeparabilityReport",
    "compare_answers",
    "find_sections",
    "measure_agreement",
    "measure_flatness",
    "measure_gradients",
    "measure_separability",
    "plot_agreement",
    "plot_flatness",
    "plot_gradient_history",
    "plot_gradients",
    "plot_separability",
    "section_gradients",
    "sweep_noise",
]
