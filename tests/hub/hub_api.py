"""What the test Hub answers: the endpoints that huggingface_hub, transformers and datasets ask."""

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.hub.hub_http import HubRequests, Refusal
from tests.hub.hub_repositories import File, MissingObject, Repository, StaleParent, is_large

REPO = r"(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"
PREFIX = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+(?:/[^/]+)?)"
OBJECT = r"(?P<oid>[0-9a-f]{64})"
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "openrail", "other", "unknown"}


class HubApi(HubRequests):
    """One method an endpoint. Their arguments are the named parts of the path."""

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


def _listed(path: str, file: File) -> dict:
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


HubApi.routes = [
    (("GET",), "/api/whoami-v2", HubApi.whoami),
    (("POST",), "/api/repos/create", HubApi.create),
    (("POST",), "/api/validate-yaml", HubApi.validate_yaml),
    (("POST",), rf"/api/{REPO}/preupload/(?P<revision>[^/]+)", HubApi.preupload),
    (("POST",), rf"/api/{REPO}/commit/(?P<revision>[^/]+)", HubApi.commit),
    (("POST",), rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)", HubApi.paths_info),
    (("POST",), rf"/api/{REPO}/branch/(?P<name>.+)", HubApi.make_branch),
    (("POST",), rf"/api/{REPO}/tag/(?P<revision>[^/]+)", HubApi.make_tag),
    (("GET",), rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", HubApi.tree),
    (("GET",), rf"/api/{REPO}/revision/(?P<revision>[^/]+)", HubApi.info),
    (("GET",), rf"/api/{REPO}/commits/(?P<revision>[^/]+)", HubApi.commits),
    (("GET",), rf"/api/{REPO}/refs", HubApi.refs),
    (("GET",), rf"/api/{REPO}", HubApi.info),
    (("POST",), rf"{PREFIX}\.git/info/lfs/objects/batch", HubApi.lfs_batch),
    (("PUT",), rf"/store/{REPO}/{OBJECT}(?:/(?P<part>\d+))?", HubApi.put),
    (("POST",), rf"/store/{REPO}/{OBJECT}", HubApi.complete),
    (("GET", "HEAD"), rf"/store/{REPO}/{OBJECT}", HubApi.fetch),
    (("POST",), rf"/verify/{REPO}", HubApi.verify),
    (
        ("GET", "HEAD"),
        rf"{PREFIX}/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        HubApi.download,
    ),
]
