"""A Hub on loopback: what the real `huggingface_hub` client says to the Hub when it pushes and loads a model.

    with HubServer() as hub:
        HF_ENDPOINT=hub.url ...

Repositories live in memory. `hub.fail(...)` makes requests fail as the real Hub's do.
"""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer

from .handler import Handler
from .repository import Repository

TOKEN = "hf_" + "loopback" * 4


@dataclass
class Failure:
    """How the next `times` requests whose "METHOD /path" matches `pattern` fail.

    `status` None drops the connection, in the middle of the file where there is one. With `seconds` there is first no
    answer for so long.
    """

    pattern: str
    status: int | None
    headers: dict[str, str]
    times: int
    seconds: float


class HubServer:
    """The server; stops with the `with` block."""

    def __init__(self, token: str = TOKEN):
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.held: list[tuple[str, threading.Event]] = []
        self.calls: list[tuple[str, Callable[[], object]]] = []
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.server.server_port}"  # another host, as the real Hub's

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        """Forget everything; what was held goes on."""
        for event in [self.stopped, *(event for _, event in self.held)]:
            event.set()
        with self.lock:
            for kept in (self.repositories, self.objects, self.requests, self.failures, self.held, self.calls):
                kept.clear()
        self.stopped = threading.Event()

    def fail(self, pattern: str, status: int | None, times: int = 1, seconds: float = 0.0, **headers: str) -> None:
        """Let the next requests whose "METHOD /path" matches fail, see `Failure`."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.failures.append(Failure(pattern, status, names, times, seconds))

    def hold(self, pattern: str) -> threading.Event:
        """Let the requests whose "METHOD /path" matches wait until the event is set."""
        event = threading.Event()
        self.held.append((pattern, event))
        return event

    def before(self, pattern: str, call: Callable[[], object]) -> None:
        """Call something once, before the next request whose "METHOD /path" matches is answered."""
        self.calls.append((pattern, call))

    def add(self, repo_id: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Put files into a repository, as somebody else has pushed them; the commit's id."""
        return self.repositories.setdefault(repo_id, Repository()).commit(revision, files)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)
