"""A saved model on disk and on the Hub."""
from .download import fetch_model
from .files import (
    build_backbone,
    load_weights,
    read_config,
    save_timm_model,
    save_weights,
    unshared_state_dict,
)
from .mixin import HubMixin

__all__ = [
    "HubMixin",
    "build_backbone",
    "fetch_model",
    "load_weights",
    "read_config",
    "save_timm_model",
    "save_weights",
    "unshared_state_dict",
]
