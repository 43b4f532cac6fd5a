"""Requests and answers of the test Hub, and what can go wrong with them. What the answers are: hub_api.py."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit


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


class HubRequests(BaseHTTPRequestHandler):
    """Finds the action of a request, sends its answer, and spoils it if a fault is due."""

    protocol_version = "HTTP/1.1"
    hub: "HubServer"  # noqa: F821  set by it
    routes: list[tuple]  # methods, pattern of the path, action

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
            for methods, pattern, action in self.routes:
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
