"""The command line, thin."""
from .program import NOT_UPLOADED, Parser, run
from .train_flags import check_frozen_flags, parse_args, parse_exit, train_config, train_parser
from .upload_lines import upload_lines

__all__ = ["NOT_UPLOADED", "Parser", "check_frozen_flags", "parse_args", "parse_exit", "run", "train_config",
           "train_parser", "upload_lines"]
