"""A saved model on disk and on the Hub."""

from .building import build_backbone, choose_head
from .card import MARK, early_exit_words, measured_rows
from .client import explain_failure
from .download import fetch_model, file_sizes, pin
from .files import FILES as MODEL_FILES
from .files import PICTURE, ExitSettings, facts, read_config, read_metrics, read_network
from .mixin import HubMixin
from .picture import plot_exits
from .push import create_repository, push_folder, push_staged, stage_model
from .records import CalibrationRecord, CurvePoint, ExitRow, ImageSource, TrainingRecord
from .saving import save_metrics, save_timm_model, save_weights, unshared_state_dict

__all__ = [
    "MARK",
    "MODEL_FILES",
    "PICTURE",
    "CalibrationRecord",
    "CurvePoint",
    "ExitRow",
    "ExitSettings",
    "HubMixin",
    "ImageSource",
    "TrainingRecord",
    "build_backbone",
    "choose_head",
    "create_repository",
    "early_exit_words",
    "explain_failure",
    "facts",
    "fetch_model",
    "file_sizes",
    "measured_rows",
    "pin",
    "plot_exits",
    "push_folder",
    "push_staged",
    "read_config",
    "read_metrics",
    "read_network",
    "save_metrics",
    "save_timm_model",
    "save_weights",
    "stage_model",
    "unshared_state_dict",
]
