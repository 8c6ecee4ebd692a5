"""A saved model on disk and on the Hub."""
from .download import fetch_model
from .files import (
    build_backbone,
    load_weights,
    read_config,
    read_metrics,
    save_metrics,
    save_timm_model,
    save_weights,
    unshared_state_dict,
)
from .mixin import HubMixin
from .picture import exit_style, plot_exits
from .push import explain_failure, push_folder, stage_model

__all__ = [
    "HubMixin",
    "build_backbone",
    "exit_style",
    "explain_failure",
    "fetch_model",
    "load_weights",
    "plot_exits",
    "push_folder",
    "read_config",
    "read_metrics",
    "save_metrics",
    "save_timm_model",
    "save_weights",
    "stage_model",
    "unshared_state_dict",
]
