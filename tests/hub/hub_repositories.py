"""What the test Hub stores, and what it says about it. In memory, without HTTP."""

import hashlib
import itertools
import re
import threading
from dataclasses import dataclass, field

import yaml

# The names that a new repository's .gitattributes lists, as far as tests may need them.
LARGE_NAMES = re.compile(
    r".*\.(7z|arrow|bin|bz2|ckpt|flac|gz|h5|jpe?g|mp3|np[yz]|ogg|onnx|parquet|pickle|pkl|png|pth?"
    r"|safetensors|tar|tflite|wav|webp|xz|zip|zst)",
    re.IGNORECASE | re.DOTALL,
)
LARGE_BYTES = 10 << 20
LICENSES = re.compile(
    r"apache-2\.0|bsd-3-clause|cc-by(-nc|-sa)?-4\.0|cc0-1\.0|creativeml-openrail-m|gpl-3\.0|mit|openrail"
    r"|other|unknown"
)
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
SDKS = {"gradio", "docker", "static", "streamlit"}


class Refusal(Exception):
    """An error answer, with the Hub's code for it if it has one."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict | None = None
    ):
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class User:
    """Someone with a token. May write, by the token's role, in the own name and in organisations."""

    name: str
    role: str = "write"
    organisations: tuple[str, ...] = ()

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organisations


@dataclass(frozen=True)
class File:
    """A file of a commit. `oid` is git's blob hash (of the pointer, for large files, which have a sha256)."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def large_object(self) -> dict | None:
        """What the API says about a large file."""
        return self.sha256 and {"sha256": self.sha256, "size": self.size, "pointerSize": 134}


@dataclass
class Commit:
    """All files at one point in time."""

    oid: str
    files: dict[str, File]
    message: str
    date: str
    parent: "Commit | None" = None

    def history(self) -> list["Commit"]:
        """This commit and all before, newest first."""
        commits = [self]
        while commits[-1].parent:
            commits.append(commits[-1].parent)
        return commits

    def last_change(self, path: str) -> dict:
        """The commit that gave a path its content, as the API tells it."""
        commits = self.history()
        for newer, older in itertools.pairwise(commits):
            if _under(newer.files, path) != _under(older.files, path):
                return newer._told()
        return commits[-1]._told()

    def _told(self) -> dict:
        return {"id": self.oid, "title": self.message, "date": self.date}


def _under(files: dict[str, File], path: str) -> dict[str, File]:
    return {
        name: file for name, file in files.items() if name == path or name.startswith(path + "/")
    }


def git_hash(content: bytes) -> str:
    """git's name for a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether the Hub keeps a file as LFS object: by name, by size, or because it is no text."""
    return size >= LARGE_BYTES or bool(LARGE_NAMES.fullmatch(path)) or b"\0" in sample


@dataclass
class Repository:
    """One model, data set or Space."""

    repo_type: str
    repo_id: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None  # of a Space
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)  # by git hash or sha256
    unverified: dict[str, bytes] = field(default_factory=dict)  # uploads, by the sha256 they claim
    granted: set[str] = field(default_factory=set)  # users that a gated repository lets in
    _numbers: itertools.count = field(default_factory=lambda: itertools.count(1))
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self):
        self._append("main", {}, "initial commit", None)

    def at(self, revision: str) -> Commit:
        """Commit of a branch, a tag or a commit id."""
        for names in (self.branches, self.tags):
            for prefix in ("", "refs/heads/", "refs/tags/"):
                if revision.removeprefix(prefix) in names:
                    return self.commits[names[revision.removeprefix(prefix)]]
        if revision not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def read(self, file: File) -> bytes:
        """Content of a file."""
        return self.contents[file.sha256 or file.oid]

    def verify(self, oid: str, size: int) -> None:
        """Keep an upload, if it is what it claims to be."""
        content = self.unverified.pop(oid, None)
        if content is None and oid not in self.contents:
            raise Refusal(404, "Object was not uploaded")
        if content is not None:
            if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
                raise Refusal(400, "Uploaded object does not have the announced size and sha256")
            self.contents[oid] = content

    def commit(
        self, branch: str, changes: list[dict], message: str, parent: str | None = None
    ) -> Commit:
        """Apply the lines of a commit request, all or none.

        Args:
            parent: the commit, or the start of its id, that the branch must be at.
        """
        with self._lock:
            if branch not in self.branches:
                raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            head = self.commits[self.branches[branch]]
            if parent and not head.oid.startswith(parent):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for change in changes:
                self._apply(files, change["key"], change["value"])
            return self._append(branch, files, message, head)

    def _apply(self, files: dict[str, File], kind: str, value: dict) -> None:
        path = value["path"]
        if kind == "file":
            oid = git_hash(value["content"])
            self.contents[oid] = value["content"]
            files[path] = File(oid, len(value["content"]))
        elif kind == "lfsFile":
            sha256 = value["oid"]
            if sha256 not in self.contents:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
            size = len(self.contents[sha256])
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
            )
            files[path] = File(git_hash(pointer.encode()), size, sha256)
        elif kind in ("deletedFile", "deletedFolder"):
            folder = kind == "deletedFolder"
            gone = [name for name in _under(files, path.rstrip("/")) if folder == (name != path)]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"unknown line {kind!r} in a commit")

    def _append(self, branch: str, files: dict, message: str, head: Commit | None) -> Commit:
        number = next(self._numbers)
        # The id depends on the content too: clients cache by it, and repositories may be made again.
        text = (
            f"{self.repo_type} {self.repo_id} {number} {message} {sorted(files.items(), key=str)}"
        )
        date = f"2026-01-{1 + number // 3600:02}T00:{number // 60 % 60:02}:{number % 60:02}.000Z"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), files, message, date, head)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    # What the API says

    def info(self, revision: str = "main", blobs: bool = False) -> dict:
        """The page of a repository."""
        commit = self.at(revision)
        siblings = []
        for path, file in sorted(commit.files.items()):
            sibling = {"rfilename": path}
            if blobs:
                sibling |= {"size": file.size, "blobId": file.oid}
                sibling |= {"lfs": file.large_object} if file.sha256 else {}
            siblings.append(sibling)
        card = self.read(commit.files["README.md"]) if "README.md" in commit.files else b""
        data = front_matter(card.decode(errors="replace")) or {}
        return {
            "_id": "0" * 24,
            "id": self.repo_id,
            "author": self.repo_id.split("/")[0],
            "sha": commit.oid,
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "downloads": 0,
            "likes": 0,
            "tags": data.get("tags") or [],
            "cardData": data,
            "siblings": siblings,
        } | ({"sdk": self.sdk} if self.sdk else {})

    def upload_mode(self, revision: str, path: str, size: int, sample: bytes) -> dict:
        """How a file is to be sent, and what is in its place now."""
        mode = "lfs" if is_large(path, size, sample) else "regular"
        there = self.at(revision).files.get(path)
        there = {"oid": there.sha256 or there.oid} if there else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False} | there

    def refs(self) -> dict:
        """Branches and tags."""

        def listed(names: dict[str, str], place: str) -> list[dict]:
            return [
                {"name": name, "ref": f"refs/{place}/{name}", "targetCommit": oid}
                for name, oid in names.items()
            ]

        branches, tags = listed(self.branches, "heads"), listed(self.tags, "tags")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def tree(self, revision: str, folder: str | None, deep: bool, expand: bool) -> list[dict]:
        """What is in a folder, and, if `deep`, in the folders in it."""
        commit, names = self.at(revision), set()
        prefix = f"{folder}/" if folder else ""
        for path in commit.files:
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                shown = range(1, len(parts) + 1) if deep else [1]
                names |= {prefix + "/".join(parts[:depth]) for depth in shown}
        if folder and not names:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return self.paths_info(revision, sorted(names), expand)

    def paths_info(self, revision: str, paths: list[str], expand: bool) -> list[dict]:
        """What is known of the paths that exist."""
        commit, found = self.at(revision), []
        for path in (path.rstrip("/") for path in paths):
            if file := commit.files.get(path):
                item = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
                if file.sha256:
                    item["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            elif inside := _under(commit.files, path):
                oid = hashlib.sha1(repr(sorted(inside.items(), key=str)).encode()).hexdigest()
                item = {"type": "directory", "oid": oid, "size": 0, "path": path}
            else:
                continue
            found.append(item | ({"lastCommit": commit.last_change(path)} if expand else {}))
        return found


def front_matter(content: str) -> dict | None:
    """The metadata of a card; None where there is none or it does not parse to a mapping."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return None
    return data if isinstance(data, dict) else None


def card_faults(content: str) -> list[str]:
    """What the Hub rejects in a card's metadata, as far as it says. Having none is no fault."""
    if not content.startswith("---"):
        return []
    data = front_matter(content)
    if data is None:
        return ["bad syntax in the yaml metadata: it must parse, to a mapping"]
    faults = []
    named = data.get("license") or []
    for name in named if isinstance(named, list) else [named]:
        if not LICENSES.fullmatch(str(name)):
            faults.append(f'"license" must be one of {LICENSES.pattern}')
    for name in ("tags", "datasets", "model-index"):
        if name in data and not isinstance(data[name], list):
            faults.append(f'"{name}" must be an array')
    for name, allowed in (("sdk", SDKS), ("colorFrom", COLOURS), ("colorTo", COLOURS)):
        if name in data and data[name] not in allowed:
            faults.append(f'"{name}" must be one of {sorted(allowed)}')
    index = data.get("model-index")
    for i, model in enumerate(index if isinstance(index, list) else []):
        faults += _model_faults(model, f"model-index[{i}]")
    return faults


def _model_faults(model: dict, place: str) -> list[str]:
    faults = [] if "name" in model else [f'"{place}.name" is required']
    if not model.get("results"):
        faults.append(f'"{place}.results" is required')
    for j, result in enumerate(model.get("results") or []):
        here = f"{place}.results[{j}]"
        for part, needed in (("task", ("type",)), ("dataset", ("name", "type"))):
            for name in needed:
                if not (result.get(part) or {}).get(name):
                    faults.append(f'"{here}.{part}.{name}" is required')
        if not result.get("metrics"):
            faults.append(f'"{here}.metrics" is required')
        for k, metric in enumerate(result.get("metrics") or []):
            for name in ("type", "value"):
                if metric.get(name) is None:
                    faults.append(f'"{here}.metrics[{k}].{name}" is required')
    return faults
