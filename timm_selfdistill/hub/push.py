"""A saved model's way to the Hub."""
import importlib
import os
import shutil
import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import get_session

from .card import PLACEHOLDER
from .files import BACKBONE, CARD, CONFIG, HEADS, PICTURE

T = TypeVar("T")

SILENCE_SECONDS = 60.0
"""After which a connection on which nothing moves is given up; huggingface_hub itself would wait for ever."""
RETRY_SECONDS = (2.0, 8.0)
"""Waits before the second and the third attempt, where the Hub does not name its own."""
LONGEST_WAIT = 300.0
TRANSIENT = {408, 409, 429, 500, 502, 503, 504}


def push_folder(
        folder: str | PathLike,
        repo_id: str,
        *,
        commit_message: str = "Upload self-distilled model",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool | None = None,
        **upload_args: Any,
) -> str:
    """Upload the files of a saved model, and nothing else in its folder, as one commit.

    What may pass by itself (too many requests, a conflict, an error of the server, a lost connection) is tried again
    twice.

    Args:
        folder: written by `save_pretrained`, or a plain timm model that a `Trainer` saved.
        upload_args: further arguments of `huggingface_hub.HfApi.upload_folder`.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: `folder` is no complete saved model.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses; there is no commit then.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as staged:
        stage_model(folder, staged)

        def push() -> str:
            full_id = create_repository(repo_id, private=private, token=token)
            _name_repository(Path(staged), full_id)
            return api.upload_folder(
                repo_id=full_id, folder_path=staged, commit_message=commit_message, revision=revision,
                create_pr=create_pr, **upload_args).commit_url

        return _persistently(push)


def create_repository(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make the repository if it is missing; its full id, with the user's name."""
    if get_session().timeout.read is None:
        get_session().timeout = SILENCE_SECONDS
    return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def stage_model(folder: str | PathLike, target: str | PathLike) -> None:
    """Put the files of a saved model into another folder, where they stay what they are when the model is saved anew.

    Raises:
        FileNotFoundError: `folder` is no complete saved model.
    """
    for name in (CONFIG, BACKBONE):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} does not exist")
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, BACKBONE, HEADS, CARD, PICTURE):
        source, copy = Path(folder) / name, Path(target) / name
        if source.is_file():
            try:
                os.link(source, copy)  # no bytes are copied: a saved file is replaced, never written into
            except OSError:  # another disk, or one without hard links
                shutil.copy(source, copy)


def explain_failure(error: BaseException, repo_id: str) -> str:
    """Why a push failed and what to do about it, in one line."""
    error = _cause(error)
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, _transport_error()):
        timed_out = "Timeout" in type(error).__name__
        return "the Hub does not answer in time" if timed_out else f"the connection to the Hub is lost ({error})"
    status = _status(error)
    words = {
        401: "the token is missing or not valid: log in with `hf auth login`, or set HF_TOKEN",
        403: f"this token may not write to {repo_id}",
        404: f"there is no {repo_id} that this token may write to",
        409: "another commit came in between",
        429: f"too many requests{_retry_after(error)}",
    }
    if status is None:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"the Hub answers {status}: {words.get(status, 'an error of the server' if status >= 500 else str(error))}"


def _persistently(push: Callable[[], T]) -> T:
    for wait in RETRY_SECONDS:
        try:
            return push()
        except Exception as outer:
            error = _cause(outer)
            if _status(error) not in TRANSIENT and not isinstance(error, _transport_error()):
                raise
            wait = float(_header(error) or wait)
            if wait > LONGEST_WAIT:
                raise
            time.sleep(wait)
    return push()


def _name_repository(folder: Path, repo_id: str) -> None:
    """Put the repository's id into a card that was written before it was known."""
    card = folder / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
        card.unlink()  # it may be another folder's file, too
        card.write_text(text, encoding="utf-8")


def _cause(error: BaseException) -> BaseException:
    """What lies behind an error: huggingface_hub wraps those of a file's upload."""
    known = (HfHubHTTPError, LocalTokenNotFoundError, _transport_error())
    while not isinstance(error, known) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return None if response is None else response.status_code


def _header(error: BaseException) -> str | None:
    value = error.response.headers.get("Retry-After") if _status(error) else None
    return value if value and value.isdigit() else None


def _retry_after(error: BaseException) -> str:
    seconds = _header(error)
    return f"; it asks to wait {seconds} s" if seconds else ""


def _transport_error() -> type[Exception]:
    """What httpx raises where there is no answer; huggingface_hub 2 has it from httpx2."""
    package = type(get_session()).__module__.partition(".")[0]
    return importlib.import_module(package).TransportError
