"""Requests and answers of the test Hub, and what can go wrong with them. What the answers are: hub_api.py."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.hub_repositories import Refusal


class Request(tuple):
    """A request as the pair (method, path). Says whether a token came with it, and the Range asked for."""

    has_token: bool
    range: str | None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match."""

    method: str
    path: str
    times: int
    status: int | None = None  # answer this instead
    applied: bool = False  # ... after doing what was asked
    cut_after: int | None = None  # close the connection after so many bytes of the body
    corrupt: bool = False  # same length, other bytes: of the answer, or of what is PUT
    delay: float = 0.0  # seconds before anything is done
    before: Callable[[], None] | None = None  # called first


class HubRequests(BaseHTTPRequestHandler):
    """Finds the action of a request, sends its answer, and spoils it if a fault is due."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: "HubServer"  # noqa: F821  set by it
    routes: list[tuple]  # methods, pattern of the path, action

    def setup(self):
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self):
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        super().finish()

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # the client went away, as it may
            self.close_connection = True

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_):
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self.body = self._read_body()
        path = unquote(parts.path)
        request = Request((self.command, path))
        request.has_token = "Authorization" in self.headers
        request.range = self.headers.get("Range")
        self.hub.requests.append(request)
        self.fault = fault = self._next_fault(path)
        if fault.corrupt and self.command == "PUT":
            self.body = _damaged(self.body)
        time.sleep(fault.delay)
        try:
            if fault.before:
                fault.before()
            if fault.applied or not fault.status:
                answer = self._act(parts.path)
            if fault.status:
                raise Refusal(fault.status, "injected fault")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            answer = json_answer({"error": refusal.message}, refusal.status, headers)
        except Exception as error:
            answer = json_answer({"error": f"the test Hub failed: {error!r}"}, 500)
        self._send(*answer)

    def _act(self, path: str) -> tuple[int, dict, bytes]:
        for methods, pattern, action in self.routes:
            # Names are quoted: a branch "a/b" is one part of the path.
            match = self.command in methods and re.fullmatch(pattern, path)
            if match:
                names = {key: value and unquote(value) for key, value in match.groupdict().items()}
                answer = action(self, **names)
                return answer if isinstance(answer, tuple) else json_answer(answer)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _next_fault(self, path: str) -> Fault:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return Fault("", "", 0)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            blocks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                blocks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(blocks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, headers: dict, body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.corrupt:
            body = _damaged(body)
        if self.fault.cut_after is not None:
            body = body[: self.fault.cut_after]
            self.close_connection = True
        self.wfile.write(body)


def json_answer(content, status: int = 200, headers: dict | None = None) -> tuple[int, dict, bytes]:
    """Status, headers and body."""
    return (
        status,
        {"Content-Type": "application/json"} | (headers or {}),
        json.dumps(content).encode(),
    )


def _damaged(content: bytes) -> bytes:
    return bytes(byte ^ 1 for byte in content[:64]) + content[64:]
