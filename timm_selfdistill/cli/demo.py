"""The demo page of a model, on this machine or as a Space."""

import argparse
import importlib.util
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .. import hub
from ..demo import SPACE_FILES, Classifier, Views, read_recorded, stage_space
from ..version import __version__
from .opening import add_model_flags, load_model
from .program import printable
from .record import read_record
from .saved import saved_model

if TYPE_CHECKING:
    import gradio

LOOPBACK = "127.0.0.1"
TRADEOFF_HELP = "output folder of `timm-selfdistill tradeoff`, whose curve and gallery the page shows"


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `demo`."""
    add_model_flags(parser)
    parser.add_argument(
        "--tradeoff",
        type=Path,
        metavar="DIR",
        help=f"{TRADEOFF_HELP} (default: the model's folder or its run directory, if it contains them)",
    )
    parser.add_argument("--port", type=_port, help="port of the page (default: the first free one from 7860 on)")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")


def demo(args: argparse.Namespace) -> int:
    """Serve the page on this machine only, until Ctrl-C.

    Raises:
        ImportError: gradio is missing.
        OSError: the port is taken.
        ValueError: the model has only one exit.
    """
    page = open_page(args.model, args.revision, args.tradeoff)
    from ..demo.page import launch_page

    try:
        address = launch_page(
            page,
            server_name=LOOPBACK,
            server_port=args.port,
            inbrowser=not args.no_browser,
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        taken = f"port {args.port} is taken" if args.port else "no port from 7860 on is free"
        raise OSError(f"{taken}; choose a free one with --port") from error
    print(printable(f"{args.model} is served at {address}; press Ctrl-C to stop"), flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        page.close(verbose=False)
    return 0


def open_page(model: str, revision: str | None = None, tradeoff: Path | None = None) -> "gradio.Blocks":
    """Build the page of a saved model with all its exits, for `demo.page.launch_page`.

    Args:
        model: folder, run directory or repository on the Hub.
        tradeoff: see `read_recorded`.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the demo needs gradio: pip install 'timm-selfdistill[demo]'")
    views = open_views(model, revision, tradeoff)
    from ..demo.page import build_page

    return build_page(views)


def open_views(model: str, revision: str | None = None, tradeoff: Path | None = None) -> Views:
    """Return what the page shows of a saved model, without gradio."""
    record = read_record(saved_model(model), revision)
    folder = hub.fetch_model(record.model, revision=record.revision, only_config=True)
    loaded = load_model(record)
    recorded = read_recorded(loaded, folder, hub.read_metrics(folder), tradeoff)
    return Views(hub.read_network(folder)["architecture"], Classifier(loaded, record.value_range), recorded)


def push_space(folder: str, repo_id: str, tradeoff: Path | None, *, private: bool | None) -> str:
    """Upload the page of a saved model as a Space, and return the URL of the commit."""
    if "dev" in __version__:
        print(
            f"timm-selfdistill {__version__} is a development version; the Space can only start once it is on PyPI",
            file=sys.stderr,
        )
    with TemporaryDirectory() as staged:
        stage_space(Path(folder), Path(staged), tradeoff)
        return hub.push_staged(
            Path(staged),
            repo_id,
            commit_message="Upload the page of a self-distilled model",
            private=private,
            repo_type="space",
            names=SPACE_FILES,
        )


def _port(text: str) -> int:
    """Argparse type of a port."""
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, got {text}")
    return int(text)
