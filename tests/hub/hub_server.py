"""A server on the loopback address that speaks what huggingface_hub, transformers and datasets send to the Hub.

For tests only: it keeps everything in memory, and can misbehave on demand (`HubServer.fail`).
"""

import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub.hub_api import HubApi
from tests.hub.hub_http import Fault
from tests.hub.hub_repositories import Repository


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
        handler = type("Handler", (HubApi,), {"hub": self})
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
