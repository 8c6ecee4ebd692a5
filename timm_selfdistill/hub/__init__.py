"""A saved model on disk and on the Hub."""
from .building import BoundedBuild, NoRandomInit, build_backbone
from .client import explain_failure
from .download import fetch_model, file_sizes
from .files import load_weights, read_config, read_metrics
from .mixin import HubMixin
from .picture import exit_style, plot_exits
from .push import create_repository, push_folder, push_staged, stage_model
from .saving import save_metrics, save_timm_model, save_weights, unshared_state_dict

__all__ = [
    "BoundedBuild",
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
    "push_staged",
    "read_config",
    "read_metrics",
    "save_metrics",
    "save_timm_model",
    "save_weights",
    "stage_model",
    "unshared_state_dict",
]
