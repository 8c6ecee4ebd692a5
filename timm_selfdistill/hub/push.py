"""A saved model's way to the Hub."""

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from .card import PLACEHOLDER, may_replace
from .client import cause, limit_silence, retry_after, status, transport_error
from .files import BACKBONE, CARD, CONFIG, FILES
from .replace import finish_replacing

RETRY_SECONDS = (2.0, 8.0)
"""Waits before the second and the third attempt, where the Hub does not name its own."""
LONGEST_WAIT = 300.0
TRANSIENT = {408, 409, 429, 500, 502, 503, 504}


def push_folder(folder: str | PathLike, repo_id: str, **push_args: Any) -> str:
    """Upload the files of a saved model, and nothing else in its folder, as one commit; see `push_staged`.

    Raises:
        FileNotFoundError: `folder` is no complete saved model.
    """
    with TemporaryDirectory() as staged:
        stage_model(folder, staged)
        return push_staged(Path(staged), repo_id, **push_args)


def push_staged(
    staged: Path,
    repo_id: str,
    *,
    commit_message: str = "Upload self-distilled model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool | None = None,
    delete_patterns: list[str] | str | None = None,
    repo_type: str | None = None,
    names: Sequence[str] = FILES,
    **upload_args: Any,
) -> str:
    """Upload a folder of `stage_model` as one commit, whose card gets the repository's id.

    What may pass by itself (too many requests, a conflict, an error of the server, a lost connection) is tried again
    twice. Files of an earlier model that this one does not have are removed; a card that was edited on the Hub stays,
    and so does every other file there.

    Args:
        repo_type: "space" for a Space; None is a model.
        names: of the files that a repository of this kind may have from us; the earlier ones that are not staged are
            removed.
        upload_args: further arguments of `huggingface_hub.HfApi.upload_folder`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the repository is public, and a private one is asked for.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    api = HfApi(token=token)
    patterns = [delete_patterns] if isinstance(delete_patterns, str) else list(delete_patterns or [])
    patterns += [name for name in names if not (staged / name).exists()]

    def push() -> str:
        full_id = create_repository(repo_id, private=private, token=token, repo_type=repo_type)
        _name_repository(staged / CARD, full_id)
        present = api.list_repo_files(full_id, revision=revision, repo_type=repo_type)
        if CARD in present:
            with TemporaryDirectory() as folder:
                card = api.hf_hub_download(full_id, CARD, revision=revision, repo_type=repo_type, local_dir=folder)
                if not may_replace(Path(card)):
                    (staged / CARD).unlink(missing_ok=True)
        return api.upload_folder(
            repo_id=full_id,
            repo_type=repo_type,
            folder_path=staged,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=patterns or None,
            **upload_args,
        ).commit_url

    return push() if create_pr else _persistently(push)  # a second attempt could open a second pull request


def create_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, repo_type: str | None = None
) -> str:
    """Make the repository if it is missing; its full id, with the user's name.

    Raises:
        ValueError: it is there and public, and a private one is asked for.
    """
    limit_silence()
    api = HfApi(token=token)
    sdk = "gradio" if repo_type == "space" else None
    full_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=sdk).repo_id
    if private and not api.repo_info(full_id, repo_type=repo_type).private:
        raise ValueError(f"{full_id} exists and is public; make it private on its page, or choose another name")
    return full_id


def stage_model(folder: str | PathLike, target: str | PathLike) -> None:
    """Put the files of a saved model into another folder, where they stay what they are when the model is saved anew.

    Raises:
        FileNotFoundError: `folder` is no complete saved model.
    """
    finish_replacing(Path(folder))
    for name in (CONFIG, BACKBONE):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} does not exist")
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        source, copy = Path(folder) / name, Path(target) / name
        if source.is_file():
            try:
                os.link(source, copy)  # no bytes are copied: a saved file is replaced, never written into
            except OSError:  # another disk, or one without hard links
                shutil.copy(source, copy)


def _persistently(push: Callable[[], str]) -> str:
    for wait in RETRY_SECONDS:
        try:
            return push()
        except Exception as outer:
            error = cause(outer)
            if status(error) not in TRANSIENT and not isinstance(error, transport_error()):
                raise
            wait = retry_after(error) or wait
            if wait > LONGEST_WAIT:
                raise
            time.sleep(wait)
    return push()


def _name_repository(card: Path, repo_id: str) -> None:
    """Put the repository's id into a card that was written before it was known."""
    if card.is_file():
        text = re.sub(rf"(?<![\w./-]){PLACEHOLDER}(?![\w./-])", repo_id, card.read_text(encoding="utf-8"))
        card.unlink()  # it may be another folder's file, too
        card.write_text(text, encoding="utf-8")
