"""What both ways of the traffic need of huggingface_hub's client, and what it says when something fails."""

import importlib

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

SILENCE_SECONDS = 60.0
"""After which a connection on which nothing moves is given up; huggingface_hub itself would wait for ever."""


def limit_silence() -> None:
    """Give the client a time-out, where it has none."""
    if get_session().timeout.read is None:
        get_session().timeout = SILENCE_SECONDS


def transport_error() -> type[Exception]:
    """What httpx raises where there is no answer; huggingface_hub 2 has it from httpx2."""
    packages = (kind.__module__.partition(".")[0] for kind in type(get_session()).__mro__)
    return importlib.import_module(next(name for name in packages if name.startswith("httpx"))).TransportError


def cause(error: BaseException) -> BaseException:
    """What lies behind an error: huggingface_hub wraps those of a file's upload."""
    known = (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, transport_error())
    while not isinstance(error, known) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status(error: BaseException) -> int | None:
    """Of the Hub's answer, if it is one."""
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return None if response is None else response.status_code


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait."""
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return None
    value = error.response.headers.get("Retry-After")
    return float(value) if value and value.isdigit() else None


def explain_failure(error: BaseException, repo_id: str) -> str:
    """Why something did not work with a repository and what to do about it, in one line."""
    error = cause(error)
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, transport_error()):
        timed_out = "Timeout" in type(error).__name__
        return "the Hub does not answer in time" if timed_out else f"the connection to the Hub is lost ({error})"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision"
    code, seconds = status(error), retry_after(error)
    said = getattr(error, "server_message", None) or " ".join(str(error).split()) or type(error).__name__
    words = {
        401: "the token is missing or not valid: log in with `hf auth login`, or set HF_TOKEN",
        403: f"this token may not write to {repo_id}",
        404: f"there is no {repo_id} that this token may write to",
        409: "another commit came in between",
        429: "too many requests" + (f"; it asks to wait {seconds:.0f} s" if seconds else ""),
    }
    if code is None:
        return said
    return f"the Hub answers {code}: {words.get(code, 'an error of the server' if code >= 500 else said)}"
