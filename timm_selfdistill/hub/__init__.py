"""A saved model on disk and on the Hub."""
from .download import fetch_model, file_sizes
from .files import NoRandomInit, build_backbone, load_weights, read_config, read_metrics
from .mixin import HubMixin
from .picture import exit_style, plot_exits
from .push import create_repository, explain_failure, push_folder, stage_model
from .saving import save_metrics, save_timm_model, save_weights, unshared_state_dict

__all__ = [
    "HubMixin",
    "NoRandomInit",
    "build_backbone",
    "create_repository",
    "exit_style",
    "explain_failure",
    "fetch_model",
    "file_sizes",
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
