"""A repository of the Hub on loopback."""

import hashlib
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".png", ".bin")


@dataclass
class Repository:
    """Commits of one repository: each is all its files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str, files: dict[str, bytes | None]) -> str:
        """A new commit with files added, or removed where they are None; its id."""
        content = {**self.commits.get(self.revisions.get(revision, ""), {}), **files}
        content = {path: data for path, data in content.items() if data is not None}
        sha = hashlib.sha1(repr((len(self.commits), revision, sorted(content))).encode()).hexdigest()
        self.commits[sha], self.revisions[revision] = content, sha
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.revisions.get(revision, revision))
