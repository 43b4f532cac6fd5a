"""What the test Hub answers: the endpoints that huggingface_hub, transformers and datasets ask."""

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs, urlsplit

from tests.hub.hub_http import HubRequests, json_answer
from tests.hub.hub_repositories import Refusal, Repository, User, card_faults

REPO = r"(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"
PREFIX = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"
OBJECT = r"(?P<oid>[0-9a-f]{64})"


class HubApi(HubRequests):
    """One method an endpoint. Their arguments are the named parts of the path."""

    # Who asks, and for what

    def _user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _known_user(self) -> User:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def _repository(self, kind: str | None, repo: str, content: bool = False) -> Repository:
        """A repository that this user may see; with `content`, whose files she may have."""
        user, found = self._user(), self.hub.repositories.get((kind or "models", repo))
        member = user is not None and user.belongs_to(repo.split("/")[0])
        if found is None or (found.private and not member):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and found.gated and not member and (not user or user.name not in found.granted):
            raise Refusal(403 if user else 401, f"Access to {repo} is restricted", "GatedRepo")
        return found

    def _writable(self, kind: str | None, repo: str) -> Repository:
        found = self._repository(kind, repo)
        self._check_may_write(repo.split("/")[0])
        return found

    def _check_may_write(self, namespace: str) -> None:
        user = self._known_user()
        if user.role != "write" or not user.belongs_to(namespace):
            raise Refusal(403, "Forbidden: pass a token with write access to this namespace")

    def _page(self, items: list) -> tuple:
        """The page of a list that the query asks for, with the address of the next."""
        start, headers = int(self.query.get("cursor", 0)), {}
        end = start + min(int(self.query.get("limit", 1000)), self.hub.page_items)
        if end < len(items):
            query = "&".join(f"{k}={v}" for k, v in (self.query | {"cursor": end}).items())
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        return json_answer(items[start:end], headers=headers)

    def _asks(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("true", "1")

    # Accounts and repositories

    def whoami(self):
        user = self._known_user()
        token = {"displayName": "test", "role": user.role}
        orgs = [{"type": "org", "name": name} for name in user.organisations]
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": user.name, "orgs": orgs, "auth": auth}

    def _named(self) -> tuple[str, str, dict]:
        """Kind and name of the repository that the body is about, which this user may write."""
        body = json.loads(self.body)
        namespace = body.get("organization") or self._known_user().name
        self._check_may_write(namespace)
        return (body.get("type") or "model") + "s", f"{namespace}/{body['name']}", body

    def create(self):
        kind, repo, body = self._named()
        if kind == "spaces" and not body.get("sdk"):
            raise Refusal(400, "sdk is required for a Space")
        answer = {"url": f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}"}
        private = bool(body.get("private")) or body.get("visibility") == "private"
        new = Repository(kind.removesuffix("s"), repo, private, sdk=body.get("sdk"))
        if self.hub.repositories.setdefault((kind, repo), new) is not new:
            return json_answer(answer | {"error": "You already created this repo"}, 409)
        return answer

    def delete(self):
        kind, repo, _ = self._named()
        self._repository(kind, repo)
        del self.hub.repositories[kind, repo]
        return {}

    def list_repositories(self, kind):
        user, found = self._user(), []
        for (its_kind, repo), repository in list(self.hub.repositories.items()):
            author = repo.split("/")[0]
            visible = not repository.private or (user and user.belongs_to(author))
            asked = self.query.get("author", author) == author
            if its_kind == kind and visible and asked and self.query.get("search", "") in repo:
                found.append(repository.info())
        return self._page(found)

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        errors = [{"message": fault} for fault in card_faults(content)]
        empty = [] if content.startswith("---") else [{"message": "empty or missing yaml metadata"}]
        return json_answer({"errors": errors, "warnings": empty}, 400 if errors else 200)

    def info(self, kind, repo, revision="main"):
        return self._repository(kind, repo).info(revision, self._asks("blobs"))

    def check_access(self, kind, repo, write):
        self._repository(kind, repo, content=True)
        if write:
            self._writable(kind, repo)
        return {}

    def refs(self, kind, repo):
        return self._repository(kind, repo).refs()

    def commits(self, kind, repo, revision):
        commits = self._repository(kind, repo).at(revision).history()
        told = [{"id": c.oid, "title": c.message, "message": "", "date": c.date} for c in commits]
        return self._page([commit | {"authors": [{"user": "maker"}]} for commit in told])

    def make_branch(self, kind, repo, name):
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        return self._make_ref(self._writable(kind, repo), "branches", name, start)

    def make_tag(self, kind, repo, revision):
        name = json.loads(self.body)["tag"]
        return self._make_ref(self._writable(kind, repo), "tags", name, revision)

    def _make_ref(self, repository: Repository, place: str, name: str, start: str) -> dict:
        if name in getattr(repository, place):
            raise Refusal(409, "Reference already exists")
        getattr(repository, place)[name] = repository.at(start).oid
        return {}

    def delete_ref(self, kind, repo, place, name):
        repository = self._writable(kind, repo)
        names = repository.branches if place == "branch" else repository.tags
        if names.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    def tree(self, kind, repo, revision, folder=None):
        repository = self._repository(kind, repo)
        deep, expand = self._asks("recursive"), self._asks("expand")
        return self._page(repository.tree(revision, folder, deep, expand))

    def paths_info(self, kind, repo, revision):
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(self.body)
            paths, expand = asked["paths"], asked.get("expand", False)
        else:
            asked = parse_qs(self.body.decode())
            paths, expand = asked.get("paths", []), asked.get("expand", [""])[0].lower() == "true"
        return self._repository(kind, repo).paths_info(revision, paths, expand)

    # Uploading

    def preupload(self, kind, repo, revision):
        repository, files = self._writable(kind, repo), json.loads(self.body)["files"]
        for asked in files:
            asked["sample"] = base64.b64decode(asked["sample"])
        return {"files": [repository.upload_mode(revision, **asked) for asked in files]}

    def lfs_batch(self, kind, repo):
        repository = self._writable(kind, repo)
        place = f"{kind or 'models'}/{repo}"
        verify = {"href": f"{self.hub.url}/verify/{place}"}
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in repository.contents:
                upload = {"href": f"{self.hub.store_url}/store/{place}/{wanted['oid']}"}
                chunk = self.hub.multipart_bytes
                if wanted["size"] > chunk:
                    numbers = range(1, -(-wanted["size"] // chunk) + 1)
                    parts = {str(number): f"{upload['href']}/{number}" for number in numbers}
                    upload["header"] = {"chunk_size": str(chunk), **parts}
                wanted["actions"] = {"upload": upload, "verify": verify}
            objects.append(wanted)
        return {"transfer": "basic", "objects": objects}

    def _store(self, kind: str, repo: str) -> Repository:
        # Addresses in the store are signed; it refuses further credentials, which shows tokens that leak.
        if "Authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        return self.hub.repositories[kind, repo]

    def put(self, kind, repo, oid, part=None):
        unverified = self._store(kind, repo).unverified
        if part:
            self.hub.parts[oid, int(part)] = self.body
        else:
            unverified[oid] = self.body
        return 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}, b""

    def complete(self, kind, repo, oid):
        blocks = []
        for part in json.loads(self.body)["parts"]:
            block = self.hub.parts.pop((oid, part["partNumber"]), b"")
            if part["etag"].strip('"') != hashlib.md5(block).hexdigest():
                raise Refusal(400, f"no part {part['partNumber']} with this ETag was uploaded")
            blocks.append(block)
        self._store(kind, repo).unverified[oid] = b"".join(blocks)
        return {}

    def verify(self, kind, repo):
        wanted = json.loads(self.body)
        self._writable(kind, repo).verify(wanted["oid"], wanted["size"])
        return {}

    def commit(self, kind, repo, revision):
        repository = self._writable(kind, repo)
        header, *changes = (json.loads(line) for line in self.body.splitlines() if line)
        for change in changes:
            if change["key"] == "file":
                change["value"]["content"] = base64.b64decode(change["value"]["content"])
        value = header["value"]
        made = repository.commit(revision, changes, value["summary"], value.get("parentCommit"))
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}/commit/{made.oid}"
        return {"success": True, "commitOid": made.oid, "commitUrl": url}

    # Downloading

    def download(self, kind, repo, revision, file):
        repository = self._repository(kind, repo, content=True)
        commit = repository.at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        found = commit.files.get(file)
        if found is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        if found.sha256 is None:
            return self._ranged(repository.read(found), headers | {"ETag": f'"{found.oid}"'})
        place = f"{self.hub.store_url}/store/{kind or 'models'}/{repo}/{found.sha256}"
        headers |= {"X-Linked-ETag": f'"{found.sha256}"', "X-Linked-Size": found.size}
        return 302, headers | {"Location": place}, b""

    def fetch(self, kind, repo, oid):
        content = self._store(kind, repo).contents.get(oid)
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


HubApi.routes = [
    (("GET",), "/api/whoami-v2", HubApi.whoami),
    (("POST",), "/api/repos/create", HubApi.create),
    (("DELETE",), "/api/repos/delete", HubApi.delete),
    (("POST",), "/api/validate-yaml", HubApi.validate_yaml),
    (("GET",), "/api/(?P<kind>models|datasets|spaces)", HubApi.list_repositories),
    (("POST",), rf"/api/{REPO}/preupload/{REVISION}", HubApi.preupload),
    (("POST",), rf"/api/{REPO}/commit/{REVISION}", HubApi.commit),
    (("POST",), rf"/api/{REPO}/paths-info/{REVISION}", HubApi.paths_info),
    (("POST",), rf"/api/{REPO}/branch/(?P<name>[^/]+)", HubApi.make_branch),
    (("POST",), rf"/api/{REPO}/tag/{REVISION}", HubApi.make_tag),
    (("DELETE",), rf"/api/{REPO}/(?P<place>branch|tag)/(?P<name>[^/]+)", HubApi.delete_ref),
    (("GET",), rf"/api/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?", HubApi.tree),
    (("GET",), rf"/api/{REPO}/revision/{REVISION}", HubApi.info),
    (("GET",), rf"/api/{REPO}/commits/{REVISION}", HubApi.commits),
    (("GET",), rf"/api/{REPO}/refs", HubApi.refs),
    (("GET",), rf"/api/{REPO}/auth-check(?P<write>/write)?", HubApi.check_access),
    (("GET",), rf"/api/{REPO}", HubApi.info),
    (("POST",), rf"{PREFIX}\.git/info/lfs/objects/batch", HubApi.lfs_batch),
    (("PUT",), rf"/store/{REPO}/{OBJECT}(?:/(?P<part>\d+))?", HubApi.put),
    (("POST",), rf"/store/{REPO}/{OBJECT}", HubApi.complete),
    (("GET", "HEAD"), rf"/store/{REPO}/{OBJECT}", HubApi.fetch),
    (("POST",), rf"/verify/{REPO}", HubApi.verify),
    (("GET", "HEAD"), rf"{PREFIX}/resolve/{REVISION}/(?P<file>.+)", HubApi.download),
]
