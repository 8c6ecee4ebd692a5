"""The requests that a Hub on loopback answers, see `server.py`."""

import base64
import hashlib
import json
import re
import socket
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard
from yaml import YAMLError

from .repository import LFS_SUFFIXES, Repository

METADATA = {
    "license": str,
    "library_name": str,
    "pipeline_tag": str,
    "tags": list,
    "datasets": list,
    "metrics": list,
    "base_model": str,
    "model-index": list,
}
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"
SPACES = "spaces/"
"""Before the ids of Spaces, in addresses and in `HubServer.repositories`."""
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_download"),
    ("HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_download"),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"/api/models/{REPOSITORY}", "info"),
    ("GET", rf"/api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)", "tree"),
    ("HEAD", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    hub: Any
    """The `HubServer`."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = f"{self.command} {url.path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            failure = next((f for f in self.hub.failures if f.times and re.search(f.pattern, request)), None)
            if failure:
                failure.times -= 1
            calls = [entry for entry in self.hub.calls if re.search(entry[0], request)]
            for entry in calls:
                self.hub.calls.remove(entry)
            waiting = [event for pattern, event in self.hub.held if re.search(pattern, request)]
        for _, call in calls:
            call()
        for event in waiting:
            event.wait()
        length = int(self.headers.get("Content-Length") or 0)
        if failure and failure.status is None:
            self._drop(length // 2)
            return
        self.body = self.rfile.read(length)
        if failure:
            self.hub.stopped.wait(failure.seconds)
            self.reply(failure.status, {"error": f"told to fail with {failure.status}"}, failure.headers)
            return
        is_space = f"/{SPACES}" in url.path
        path = url.path.replace(f"/api/{SPACES}", "/api/models/").replace(f"/{SPACES}", "/", 1)
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                values = {key: unquote(value) for key, value in match.groupdict().items()}
                if is_space:
                    values["repo"] = SPACES + values["repo"]
                getattr(self, name)(**values)
                return
        self.reply(404, {"error": f"no such address: {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _drop(self, count: int) -> None:
        """Take some bytes of what is sent and hang up; of what is fetched, send the beginning."""
        self.rfile.read(count)
        if self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"0" * 1000)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, status: int, value: object = None, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for key, header in {"Content-Length": str(len(data)), "X-Request-Id": "loopback", **(headers or {})}.items():
            self.send_header(key, header)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # the client has given up
                self.wfile.write(data)

    def _allowed(self, write: bool = False, repo: str | None = None) -> bool:
        """Whether the request's token may do this; replies if not."""
        given = self.headers.get("Authorization")
        private = repo in self.hub.repositories and self.hub.repositories[repo].private
        if given == f"Bearer {self.hub.token}" or (given is None and not write and not private):
            return True
        self.reply(401, {"error": "Invalid credentials in Authorization header"})
        return False

    def _find(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """Files of a revision; replies if there is no such repository or revision."""
        if repo not in self.hub.repositories:
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        files = self.hub.repositories[repo].files(revision)
        if files is None and revision == "main":
            return {}
        if files is None:
            self.reply(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return files

    def whoami(self) -> None:
        if self._allowed(write=True):
            self.reply(200, {"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        if not self._allowed(write=True):
            return
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        is_space = wanted.get("type") == "space"
        if is_space and wanted.get("sdk") not in ("gradio", "docker", "static"):
            self.reply(400, {"error": f"a Space needs an sdk, got {wanted.get('sdk')}"})
            return
        repo = f"{SPACES * is_space}{repo_id}"
        if repo in self.hub.repositories:
            self.reply(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{repo}"})
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repositories[repo] = Repository(private)
        self.reply(200, {"url": f"{self.hub.url}/{repo}", "name": repo_id, "id": repo_id})

    def validate_yaml(self) -> None:
        try:
            data = ModelCard(json.loads(self.body)["content"]).data.to_dict()
            errors = [
                f"{key} must be {kind.__name__}"
                for key, kind in METADATA.items()
                if key in data and not isinstance(data[key], kind)
            ]
        except (ValueError, KeyError, TypeError, YAMLError) as error:
            errors = [str(error)]
        self.reply(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if not self._allowed(write=True) or self._find(repo) is None:
            return
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "oid": None,
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
            }
            for file in json.loads(self.body)["files"]
        ]
        self.reply(200, {"files": files})

    def lfs_batch(self, repo: str) -> None:
        if not self._allowed(write=True) or self._find(repo) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.objects:
                known["actions"] = {"upload": {"href": f"{self.hub.storage_url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(known)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply(400, {"error": "the content does not have this checksum"})
            return
        self.hub.objects[oid] = self.body
        self.reply(200)

    def lfs_download(self, oid: str) -> None:
        self._send_file(self.hub.objects[oid], oid)

    def commit(self, repo: str, revision: str) -> None:
        if not self._allowed(write=True) or self._find(repo) is None:
            return
        files: dict[str, bytes | None] = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files[value["path"]] = None
        create_pr = self.query.get("create_pr") == ["1"]
        branch = "refs/pr/1" if create_pr else revision
        with self.hub.lock:
            sha = self.hub.repositories[repo].commit(branch, files)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        answer = {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
        self.reply(200, answer)

    def info(self, repo: str, revision: str = "main") -> None:
        if not self._allowed(repo=repo):
            return
        files = self._find(repo, revision)
        if files is None:
            return
        repository = self.hub.repositories[repo]
        self.reply(
            200,
            {
                "_id": "0" * 24,
                "id": repo.removeprefix(SPACES),
                "modelId": repo.removeprefix(SPACES),
                "private": repository.private,
                "sha": repository.revisions.get(revision, revision),
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path, "size": len(data)} for path, data in files.items()],
            },
        )

    def tree(self, repo: str, revision: str) -> None:
        if not self._allowed(repo=repo):
            return
        files = self._find(repo, revision)
        if files is None:
            return
        entries = []
        for path, data in files.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.reply(200, entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not self._allowed(repo=repo):
            return
        files = self._find(repo, revision)
        if files is None:
            return
        if path not in files:
            self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        data, repository = files[path], self.hub.repositories[repo]
        sha = repository.revisions.get(revision, revision)
        if path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(data).hexdigest()
            self.hub.objects[oid] = data
            self.reply(
                302,
                None,
                {
                    "Location": f"{self.hub.storage_url}/lfs/{oid}",
                    "X-Repo-Commit": sha,
                    "X-Linked-Etag": f'"{oid}"',
                    "X-Linked-Size": str(len(data)),
                    "ETag": f'"{oid}"',
                },
            )
        else:
            self._send_file(data, hashlib.sha1(data).hexdigest(), sha)

    def _send_file(self, data: bytes, etag: str, commit: str = "") -> None:
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if commit:
            headers["X-Repo-Commit"] = commit
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            self.reply(200, data, headers)
            return
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self.reply(206, data[start : end + 1], headers)
