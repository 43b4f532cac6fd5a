"""A server on the loopback address that speaks what huggingface_hub, transformers and datasets send to the Hub.

For tests only: it keeps everything in memory, and can misbehave on demand (`HubServer.fail`).
"""

import hashlib
import socket
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub.hub_api import HubApi
from tests.hub.hub_http import Fault, Request
from tests.hub.hub_repositories import Repository, User, is_large


class HubServer:
    """The server and what it holds. A context manager.

    Args:
        multipart_bytes: larger files are uploaded in parts of this size.
        page_items: lists are answered in pages of so many.

    Attributes:
        url: for HF_ENDPOINT.
        token: of the user "maker", who may write, in her own name and in "org".
        reader_token: of the user "reader", who may not write.
        requests: (method, path) of all requests so far (see Request).
    """

    token = "hf_maker"
    reader_token = "hf_reader"

    def __init__(self, multipart_bytes: int = 1 << 40, page_items: int = 50):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.users = {
            self.token: User("maker", organisations=("org",)),
            self.reader_token: User("reader", role="read"),
        }
        self.multipart_bytes = multipart_bytes
        self.page_items = page_items
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (HubApi,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Large files come from another host, as the Hub's do.
        self.store_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self.lock:  # clients keep connections open: those would be served on
            for connection in self.connections:
                with suppress(OSError):  # closed from the other side
                    connection.shutdown(socket.SHUT_RDWR)

    def fail(self, method: str, path: str, times: int = 1, **how) -> None:
        """Spoil the next requests of a method whose path matches a pattern (see Fault)."""
        self.faults.append(Fault(method, path, times, **how))

    def add_user(self, name: str, role: str = "write", organisations: tuple[str, ...] = ()) -> str:
        """A further user. Returns the token."""
        self.users[f"hf_{name}"] = User(name, role, organisations)
        return f"hf_{name}"

    def add_repo(
        self, repo_id: str, files: dict[str, bytes] | None = None, repo_type: str = "model", **how
    ) -> Repository:
        """A repository that is there already, with files; may be private, gated (see Repository)."""
        repository = Repository(repo_type, repo_id, **how)
        changes = []
        for path, content in (files or {}).items():
            oid = hashlib.sha256(content).hexdigest()
            if large := is_large(path, len(content), content[:512]):
                repository.contents[oid] = content
            value = {"path": path, "oid": oid, "content": content}
            changes.append({"key": "lfsFile" if large else "file", "value": value})
        if changes:
            repository.commit("main", changes, "files")
        self.repositories[repo_type + "s", repo_id] = repository
        return repository

    def gate(self, repo_id: str, repo_type: str = "model", granted: tuple[str, ...] = ()) -> None:
        """Let only members and these users have the files."""
        repository = self.repository(repo_id, repo_type)
        repository.gated, repository.granted = True, set(granted)

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """A repository that must be there."""
        return self.repositories[repo_type + "s", repo_id]

    def files(
        self, repo_id: str, revision: str = "main", repo_type: str = "model"
    ) -> dict[str, bytes]:
        """Path to content."""
        repository = self.repository(repo_id, repo_type)
        return {path: repository.read(file) for path, file in repository.at(revision).files.items()}

    def environment(self, home: Path, token: str | None = token) -> dict[str, str]:
        """Variables for a process that takes this server for the Hub, with a cache of its own."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return variables | ({"HF_TOKEN": token} if token else {})
