"""A server on the loopback address that speaks what huggingface_hub, transformers and datasets send to the Hub.

For tests only: it keeps everything in memory, and can misbehave on demand (`HubServer.fail`).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.hub_repositories import MissingObject, Repository, StaleParent, is_large

REPO = r"(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"
PREFIX = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+(?:/[^/]+)?)"
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "openrail", "other", "unknown"}


class Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    method: str
    path: str
    times: int
    status: int | None = None  # answer this instead
    applied: bool = False  # ... after doing what was asked
    cut_after: int | None = None  # close the connection after so many bytes of the body
    corrupt: bool = False  # same length, other bytes
    before: Callable[[], None] | None = None  # called first


class HubServer:
    """The server and what it holds. A context manager.

    Attributes:
        url: for HF_ENDPOINT.
        token: of the user "maker", who may write, in her own name and in "org".
        reader_token: of the user "reader", who may not write.
        requests: (method, path) of all requests so far.
    """

    token = "hf_maker"
    reader_token = "hf_reader"

    def __init__(self, multipart_bytes: int = 1 << 40):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.users = {self.token: "maker", self.reader_token: "reader"}
        self.multipart_bytes = multipart_bytes
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Large files come from another host, as the Hub's do.
        self.store_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, times: int = 1, **how) -> None:
        """Spoil the next requests of a method whose path matches a pattern (see Fault)."""
        self.faults.append(Fault(method, path, times, **how))

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """A repository that must be there."""
        return self.repositories[repo_type + "s", repo_id]

    def files(
        self, repo_id: str, revision: str = "main", repo_type: str = "model"
    ) -> dict[str, bytes]:
        """Path to content."""
        repository = self.repository(repo_id, repo_type)
        commit = repository.resolve(revision)
        return {path: repository.read(file) for path, file in commit.files.items()}

    def environment(self, home: Path, token: str | None = token) -> dict[str, str]:
        """Variables for a process that takes this server for the Hub, with a cache of its own."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return variables | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_):
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self.body = self._read_body()
        self.hub.requests.append((self.command, path))
        self.fault = self._next_fault(path)
        try:
            if self.fault and self.fault.before:
                self.fault.before()
            if self.fault and self.fault.status and not self.fault.applied:
                raise Refusal(self.fault.status, "injected fault")
            for methods, pattern, action in ROUTES:
                match = self.command in methods and re.fullmatch(pattern, path)
                if match:
                    answer = action(self, **match.groupdict())
                    if self.fault and self.fault.status:
                        raise Refusal(self.fault.status, "injected fault")
                    self._send(*answer) if isinstance(answer, tuple) else self._send_json(answer)
                    return
            raise Refusal(404, f"no such page: {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            body = json.dumps({"error": refusal.message}).encode()
            self._send(refusal.status, headers | {"Content-Type": "application/json"}, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _next_fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send_json(self, content, status: int = 200, headers: dict | None = None) -> None:
        body = json.dumps(content).encode()
        self._send(status, {"Content-Type": "application/json", **(headers or {})}, body)

    def _send(self, status: int, headers: dict, body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", headers.get("Content-Length", len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.corrupt:
            body = bytes(byte ^ 1 for byte in body[:64]) + body[64:]
        if self.fault and self.fault.cut_after is not None:
            body = body[: self.fault.cut_after]
            self.close_connection = True
        self.wfile.write(body)

    # Who asks, and for what

    def _user(self, needed: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise Refusal(401, "Invalid username or password.")
        return self.hub.users.get(token)

    def _writer(self, namespace: str) -> str:
        user = self._user(needed=True)
        if user == "reader" or namespace not in (user, "org"):
            raise Refusal(403, "Forbidden: pass a token with write access to this namespace")
        return user

    def _repository(self, kind: str | None, repo: str, content: bool = False) -> Repository:
        user = self._user()
        found = self.hub.repositories.get((kind or "models", repo))
        member = user and repo.split("/")[0] in (user, "org") and user != "reader"
        if found is None or (found.private and not member):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and found.gated and not member and user not in found.granted:
            raise Refusal(403, f"Access to {repo} is restricted", "GatedRepo")
        return found

    def _commit_of(self, repository: Repository, revision: str):
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Accounts and repositories

    def whoami(self):
        user = self._user(needed=True)
        role = "read" if user == "reader" else "write"
        return {
            "type": "user",
            "name": user,
            "orgs": [{"name": "org"}],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    def create(self):
        wanted = json.loads(self.body)
        user = self._user(needed=True)
        namespace = wanted.get("organization") or user
        self._writer(namespace)
        repo_type, repo_id = wanted.get("type") or "model", f"{namespace}/{wanted['name']}"
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}"}
        if (repo_type + "s", repo_id) in self.hub.repositories:
            return self._json(409, answer | {"error": "You already created this repo"})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[repo_type + "s", repo_id] = Repository(repo_type, repo_id, private)
        return answer

    @staticmethod
    def _json(status: int, content) -> tuple:
        return status, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        errors = [{"message": fault} for fault in card_faults(content)]
        return self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, kind, repo, revision="main"):
        repository = self._repository(kind, repo)
        commit = self._commit_of(repository, revision)
        siblings = []
        for path, file in sorted(commit.files.items()):
            sibling = {"rfilename": path, "size": file.size, "blobId": file.oid}
            if file.sha256:
                sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
            siblings.append(sibling if "blobs" in self.query else {"rfilename": path})
        return {
            "_id": "0" * 24,
            "id": repo,
            "author": repo.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }

    def refs(self, kind, repo):
        repository = self._repository(kind, repo)

        def listed(names: dict[str, str], place: str) -> list[dict]:
            return [
                {"name": name, "ref": f"refs/{place}/{name}", "targetCommit": oid}
                for name, oid in names.items()
            ]

        return {
            "branches": listed(repository.branches, "heads"),
            "tags": listed(repository.tags, "tags"),
            "converts": [],
        }

    def commits(self, kind, repo, revision):
        repository = self._repository(kind, repo)
        self._commit_of(repository, revision)
        return [
            {"id": c.oid, "title": c.message, "message": "", "date": c.date, "authors": []}
            for c in reversed(repository.commits.values())
        ]

    def make_branch(self, kind, repo, name):
        repository = self._repository(kind, repo)
        self._writer(repo.split("/")[0])
        if name in repository.branches:
            raise Refusal(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository.branches[name] = self._commit_of(repository, start).oid
        return {}

    def make_tag(self, kind, repo, revision):
        repository = self._repository(kind, repo)
        self._writer(repo.split("/")[0])
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise Refusal(409, "Tag already exists")
        repository.tags[tag] = self._commit_of(repository, revision).oid
        return {}

    # Listing

    def tree(self, kind, repo, revision, folder=None):
        repository = self._repository(kind, repo)
        commit = self._commit_of(repository, revision)
        prefix = f"{folder}/" if folder else ""
        deep = self.query.get("recursive", "").lower() in ("true", "1")
        items = {}
        for path in sorted(commit.files):
            if not path.startswith(prefix):
                continue
            names = path.removeprefix(prefix).split("/")
            for depth in range(1, len(names)):
                if deep or depth == 1:
                    name = prefix + "/".join(names[:depth])
                    items[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            if deep or len(names) == 1:
                items[path] = _listed(path, commit.files[path])
        if folder and not items:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        listed = list(items.values())
        start, size = int(self.query.get("cursor", 0)), int(self.query.get("limit", 50))
        headers = {"Content-Type": "application/json"}
        if start + size < len(listed):
            kept = f"recursive={deep}&limit={size}&cursor={start + size}"
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{kept}>; rel="next"'
        return 200, headers, json.dumps(listed[start : start + size]).encode()

    def paths_info(self, kind, repo, revision):
        commit = self._commit_of(self._repository(kind, repo), revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        found = []
        for path in paths:
            if path in commit.files:
                found.append(_listed(path, commit.files[path]))
            elif any(name.startswith(path.rstrip("/") + "/") for name in commit.files):
                found.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        return found

    # Uploading

    def preupload(self, kind, repo, revision):
        repository = self._repository(kind, repo)
        self._writer(repo.split("/")[0])
        commit = self._commit_of(repository, revision)
        answer = []
        for asked in json.loads(self.body)["files"]:
            large = is_large(asked["path"], asked["size"])
            told = {
                "path": asked["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if there := commit.files.get(asked["path"]):
                told["oid"] = there.sha256 or there.oid
            answer.append(told)
        return {"files": answer}

    def lfs_batch(self, kind, repo):
        repository = self._repository(kind, repo)
        self._writer(repo.split("/")[0])
        store = f"{self.hub.store_url}/store/{kind or 'models'}/{repo}"
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            if oid in repository.contents:
                objects.append(wanted)
                continue
            upload = {"href": f"{store}/{oid}"}
            if size >= self.hub.multipart_bytes:
                chunk = self.hub.multipart_bytes
                parts = {str(i + 1): f"{store}/{oid}/{i + 1}" for i in range(-(-size // chunk))}
                upload = {"href": f"{store}/{oid}", "header": {"chunk_size": str(chunk), **parts}}
            verify = {"href": f"{self.hub.url}/verify/{kind or 'models'}/{repo}"}
            objects.append({**wanted, "actions": {"upload": upload, "verify": verify}})
        return {"transfer": "basic", "objects": objects}

    def put(self, kind, repo, oid, part=None):
        if part:
            self.hub.parts[oid, int(part)] = self.body
            return 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}, b""
        return self._keep(kind, repo, oid, self.body)

    def complete(self, kind, repo, oid):
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        return self._keep(kind, repo, oid, b"".join(self.hub.parts[oid, n] for n in numbers))

    def _keep(self, kind: str, repo: str, oid: str, content: bytes) -> tuple:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(422, "the content does not have this sha256")
        self.hub.repositories[kind, repo].contents[oid] = content
        return 200, {"ETag": f'"{oid}"'}, b""

    def verify(self, kind, repo):
        wanted = json.loads(self.body)
        content = self.hub.repositories[kind, repo].contents.get(wanted["oid"])
        if content is None or len(content) != wanted["size"]:
            raise Refusal(404, "object not uploaded")
        return {}

    def commit(self, kind, repo, revision):
        repository = self._repository(kind, repo)
        self._writer(repo.split("/")[0])
        header, *changes = (json.loads(line) for line in self.body.splitlines() if line)
        for change in changes:
            if change["key"] == "file":
                change["value"]["content"] = base64.b64decode(change["value"]["content"])
        value = header["value"]
        try:
            made = repository.commit(revision, changes, value["summary"], value.get("parentCommit"))
        except StaleParent:
            raise Refusal(
                412, "A commit has happened since. Please refresh and try again."
            ) from None
        except MissingObject as error:
            raise Refusal(400, f"LFS pointer to a file that does not exist: {error}") from None
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None
        return {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{self.hub.url}/{repo}/commit/{made.oid}",
        }

    # Downloading

    def download(self, kind, repo, revision, file):
        repository = self._repository(kind, repo, content=True)
        commit = self._commit_of(repository, revision)
        found = commit.files.get(file)
        headers = {"X-Repo-Commit": commit.oid}
        if found is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        if found.sha256 is None:
            return self._ranged(repository.read(found), headers | {"ETag": f'"{found.oid}"'})
        headers |= {"X-Linked-ETag": f'"{found.sha256}"', "X-Linked-Size": found.size}
        place = f"{self.hub.store_url}/store/{kind or 'models'}/{repo}/{found.sha256}"
        return 302, headers | {"Location": place}, b""

    def fetch(self, kind, repo, oid):
        content = self.hub.repositories[kind, repo].contents.get(oid)
        if content is None:
            raise Refusal(404, "no such object")
        return self._ranged(content, {"ETag": f'"{oid}"'})

    def _ranged(self, content: bytes, headers: dict) -> tuple:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match or match.group(0) == "bytes=-":
            return 200, headers, content
        first, last = match.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last), len(content) - 1) if first and last else len(content) - 1
        if start >= len(content):
            return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return 206, headers, content[start : end + 1]


def _listed(path: str, file) -> dict:
    item = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.sha256:
        item["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return item


def card_faults(content: str) -> list[str]:
    """What the Hub would reject in a card's metadata, as far as it says."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if not match:
        return ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"bad indentation or syntax in yaml: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    faults = []
    if (license_ := data.get("license")) is not None and license_ not in LICENSES:
        faults.append(f'"license" must be one of {sorted(LICENSES)}')
    for name in ("tags", "datasets", "model-index"):
        if name in data and not isinstance(data[name], list):
            faults.append(f'"{name}" must be an array')
    for model in data.get("model-index") or []:
        for result in model.get("results") or [{}]:
            if not (result.get("task") or {}).get("type"):
                faults.append('"model-index[0].results[0].task.type" is required')
            dataset = result.get("dataset") or {}
            if not dataset.get("name") or not dataset.get("type"):
                faults.append('"model-index[0].results[0].dataset" needs name and type')
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type") or "value" not in metric:
                    faults.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return faults


ROUTES = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), rf"/api/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("POST",), rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (("POST",), rf"/api/{REPO}/branch/(?P<name>.+)", _Handler.make_branch),
    (("POST",), rf"/api/{REPO}/tag/(?P<revision>[^/]+)", _Handler.make_tag),
    (("GET",), rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("GET",), rf"/api/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), rf"/api/{REPO}/commits/(?P<revision>[^/]+)", _Handler.commits),
    (("GET",), rf"/api/{REPO}/refs", _Handler.refs),
    (("GET",), rf"/api/{REPO}", _Handler.info),
    (("POST",), rf"{PREFIX}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), rf"/store/{REPO}/(?P<oid>[0-9a-f]{{64}})(?:/(?P<part>\d+))?", _Handler.put),
    (("POST",), rf"/store/{REPO}/(?P<oid>[0-9a-f]{{64}})", _Handler.complete),
    (("GET", "HEAD"), rf"/store/{REPO}/(?P<oid>[0-9a-f]{{64}})", _Handler.fetch),
    (("POST",), rf"/verify/{REPO}", _Handler.verify),
    (
        ("GET", "HEAD"),
        rf"{PREFIX}/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        _Handler.download,
    ),
]
