"""What the test Hub stores: repositories, commits, branches, tags, and files by their hash. In memory."""

import hashlib
import itertools
import threading
from dataclasses import dataclass, field

LARGE_SUFFIXES = (".safetensors", ".png", ".jpg", ".wav", ".flac", ".parquet", ".bin", ".zip")
LARGE_BYTES = 10 << 20


@dataclass(frozen=True)
class File:
    """A file of a commit. `oid` is git's blob hash; large files have a sha256 too."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Commit:
    """All files at one point in time."""

    oid: str
    files: dict[str, File]
    message: str
    date: str


class StaleParent(Exception):
    """A commit names a parent that is not the branch's head."""


class MissingObject(Exception):
    """A commit names a large file that was never uploaded."""


def git_hash(content: bytes) -> str:
    """git's name for a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file as LFS object."""
    return size >= LARGE_BYTES or path.lower().endswith(LARGE_SUFFIXES)


@dataclass
class Repository:
    """One model, data set or Space."""

    repo_type: str
    repo_id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)  # by git hash or sha256
    granted: set[str] = field(default_factory=set)  # users that a gated repository lets in
    _numbers: itertools.count = field(default_factory=lambda: itertools.count(1))
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self):
        self._append("main", {}, "initial commit", None)

    def resolve(self, revision: str) -> Commit | None:
        """Commit of a branch, a tag or a commit id."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def commit(
        self, branch: str, changes: list[dict], message: str, parent: str | None = None
    ) -> Commit:
        """Apply the lines of a commit request.

        Raises:
            KeyError: if there is no such branch.
            StaleParent, MissingObject: as their names say; nothing is changed then.
        """
        with self._lock:
            head = self.commits[self.branches[branch]]
            if parent is not None and parent != head.oid:
                raise StaleParent
            files = dict(head.files)
            for change in changes:
                self._apply(files, change["key"], change["value"])
            return self._append(branch, files, message, head)

    def _apply(self, files: dict[str, File], kind: str, value: dict) -> None:
        path = value["path"]
        if kind == "file":
            content = value["content"]
            oid = git_hash(content)
            self.contents[oid] = content
            files[path] = File(oid, len(content))
        elif kind == "lfsFile":
            sha256 = value["oid"]
            if sha256 not in self.contents:
                raise MissingObject(sha256)
            files[path] = File(git_hash(sha256.encode()), len(self.contents[sha256]), sha256)
        elif kind == "deletedFile":
            files.pop(path, None)
        elif kind == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise ValueError(f"unknown line {kind!r} in a commit")

    def _append(self, branch: str, files: dict, message: str, head: Commit | None) -> Commit:
        number = next(self._numbers)
        text = f"{self.repo_type} {self.repo_id} {number} {message}"
        date = f"2026-01-01T00:{number // 60:02}:{number % 60:02}.000Z"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), files, message, date)
        if head is not None and head.files == files:
            return head  # an empty commit changes nothing
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def read(self, file: File) -> bytes:
        """Content of a file."""
        return self.contents[file.sha256 or file.oid]
