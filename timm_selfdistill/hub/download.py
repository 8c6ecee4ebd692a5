"""A model's files from the Hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .building import check_plain_network
from .client import explain_failure, limit_silence, transport_error
from .files import BACKBONE, CONFIG, FILES, HEADS
from .replace import finish_replacing
from .trust import check_names


def fetch_model(
    model_id: str | PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    only_config: bool = False,
    check_sizes: Callable[[dict[str, int]], None] | None = None,
) -> Path:
    """The folder of a saved model: `model_id` itself where it is one, else the files of that repository, cached.

    Only the three files of a model are asked for, whatever else is in the repository.

    Args:
        model_id: a folder, or the id of a repository on the Hub ("user/name").
        revision, token, cache_dir, local_files_only, force_download: of `huggingface_hub.snapshot_download`.
        only_config: config.json alone, without the weights.
        check_sizes: is given the bytes of each file on the Hub before any is fetched; raises where they cannot be.

    Raises:
        FileNotFoundError: there is no such folder, repository or revision, or it is not cached and there is no way to
            the Hub.
        PermissionError: the repository is private or gated, and the token does not open it.
        OSError: the Hub answers with another error.
        ValueError: the weights are there only in a file that would have to be unpickled; or they are fetched, and the
            config of a plain timm model asks for far more memory than they take.
    """
    if str(model_id) and Path(model_id).is_dir():
        folder = Path(model_id)
        finish_replacing(folder)
        check_names((entry.name for entry in folder.iterdir()), BACKBONE, folder)
        if not only_config:
            check_plain_network(folder)
        return folder
    name = str(model_id)
    limit_silence()
    offline = local_files_only or constants.HF_HUB_OFFLINE
    with _clear_errors(name, revision, offline):
        if not offline:
            sizes = _list_sizes(name, revision, token)
            check_names(sizes, BACKBONE, name)
            if check_sizes:
                check_sizes(sizes)
        fetched = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=[CONFIG] if only_config else [CONFIG, BACKBONE, HEADS],
        )
    if not only_config:
        check_names((entry.name for entry in Path(fetched).iterdir()), BACKBONE, name)
        check_plain_network(Path(fetched))
    return Path(fetched)


@contextmanager
def _clear_errors(name: str, revision: str | None, offline: bool) -> Iterator[None]:
    """Errors of huggingface_hub become those of `fetch_model`."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and no id of a repository on the Hub (user/name, without a prefix)"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(f"{name} is gated: ask for access on its page, then log in: `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and no repository on the Hub that this token may read; log in with"
            " `hf auth login`, or pass token=..., if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise OSError(_answered(error.__cause__, name + at)) from error
        why = "the Hub may not be asked (offline)" if offline else "the Hub cannot be reached"
        raise FileNotFoundError(f"{name}{at} is no folder here and not in the cache, and {why}") from error
    except HfHubHTTPError as error:
        raise OSError(_answered(error, name + at)) from error
    except transport_error() as error:
        raise OSError(f"{name}{at} cannot be fetched: {explain_failure(error, name)}") from error


def pin(model_id: str | PathLike, folder: Path, revision: str | None) -> str | None:
    """The revision with which `fetch_model` gives files of the same commit again.

    Args:
        folder: what it gave for `model_id` at `revision`; the Hub's cache names it after the commit.
    """
    return revision if Path(model_id).is_dir() else folder.name


def file_sizes(model_id: str | PathLike, revision: str | None = None) -> dict[str, int]:
    """Bytes of each file of a saved model, in a folder or on the Hub; none where the Hub does not say."""
    if Path(model_id).is_dir():
        sizes = {path.name: path.stat().st_size for path in Path(model_id).iterdir() if path.is_file()}
    else:
        sizes = _list_sizes(str(model_id), revision, None)
    return {name: sizes[name] for name in FILES if name in sizes}


def _list_sizes(name: str, revision: str | None, token: str | bool | None) -> dict[str, int]:
    """The repository's files; none where they cannot be listed.

    Whatever stands in the way then, `snapshot_download` meets it again: it raises, or finds the model in the cache.
    """
    try:
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, transport_error()):
        return {}
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _answered(error: HfHubHTTPError, name: str) -> str:
    status = error.response.status_code if error.response is not None else "nothing"
    return f"the Hub answers {status} for {name}; try again later, or check the token and its rights"
