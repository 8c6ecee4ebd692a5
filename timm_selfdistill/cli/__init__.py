"""The command line: flags, messages and exit codes."""

from .found import found_lines, found_settings
from .methods import EXIT_METHODS, check_method_flags, create_task, take_over_exits
from .opening import add_measuring_flags, open_data, read_data
from .predict import add_predict_flags, predict
from .program import NOT_UPLOADED, Parser, parse_exit, run, say
from .record import Record, read_record
from .saved import saved_model, timm_name
from .train import train_command
from .train_flags import check_frozen_flags, parse_args, train_config, train_parser
from .upload_lines import upload_lines

__all__ = [
    "EXIT_METHODS",
    "NOT_UPLOADED",
    "Parser",
    "Record",
    "add_measuring_flags",
    "add_predict_flags",
    "check_frozen_flags",
    "check_method_flags",
    "create_task",
    "found_lines",
    "found_settings",
    "open_data",
    "parse_args",
    "parse_exit",
    "predict",
    "read_data",
    "read_record",
    "run",
    "saved_model",
    "say",
    "take_over_exits",
    "timm_name",
    "train_command",
    "train_config",
    "train_parser",
    "upload_lines",
]
