"""The command line, thin."""
from .found import found_lines, found_settings
from .methods import EXIT_METHODS, check_method_flags, create_task
from .opening import known_range
from .program import NOT_UPLOADED, Parser, parse_exit, run
from .train_flags import check_frozen_flags, parse_args, train_config, train_parser
from .upload_lines import upload_lines

__all__ = ["EXIT_METHODS", "NOT_UPLOADED", "Parser", "check_frozen_flags", "check_method_flags", "create_task",
           "found_lines", "found_settings",
           "known_range", "parse_args", "parse_exit", "run", "train_config", "train_parser", "upload_lines"]
