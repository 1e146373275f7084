"""A bad network in front of the tests' S3 server: answers 503, stalls, or cuts the connection in the middle.

client -> Network (the first n requests that match a fault suffer it, the rest pass) -> server
"""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

from neurostorm.io import object_requests

Kind = Literal["refuse", "stall", "cut answer", "cut upload", "lose answer", "forbid"]
_XML = b"<?xml version='1.0'?>\n<Error><Code>%b</Code><Message>%b</Message></Error>"


@dataclass
class Fault:
    """What happens to the next `left` requests of `method` whose path contains `part`."""

    kind: Kind
    method: str
    part: str
    left: int


class Network:
    """A proxy that fails on demand; `address` leads to it."""

    def __init__(self, server: str) -> None:
        self.server = urlsplit(server).netloc
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.refused: list[str] = []  # in an outage
        self.outage: Kind | None = None  # what all requests suffer for as long as it is set
        self.over = threading.Event()
        self._lock = threading.Lock()
        network = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                network._handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, kind: Kind, method: str, part: str = "", times: int = 1) -> None:
        """Let the next `times` requests of a method, with `part` in their path and query, suffer a fault."""
        self.faults.append(Fault(kind, method, part, times))

    def be_away(self, seconds: float) -> list[str]:
        """Refuse everything for so long; the requests that were refused."""
        first, self.outage = len(self.refused), "refuse"
        time.sleep(seconds)
        self.outage = None
        return self.refused[first:]

    def close(self) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()

    def _next_fault(self, request: BaseHTTPRequestHandler) -> Kind | None:
        with self._lock:
            self.requests.append(f"{request.command} {request.path}")
            for fault in self.faults:
                if fault.method == request.command and fault.part in request.path and fault.left > 0:
                    fault.left -= 1
                    return fault.kind
            if self.outage is not None:
                self.refused.append(self.requests[-1])
        return self.outage

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        fault = self._next_fault(request)
        size = int(request.headers.get("Content-Length") or 0)
        if fault == "cut upload":
            request.rfile.read(size // 2)
            request.close_connection = True
            return
        body = request.rfile.read(size)
        if fault == "stall":
            self.over.wait(20)
            request.close_connection = True
        elif fault == "refuse":
            _answer(request, 503, {}, _XML % (b"SlowDown", b"Please reduce your request rate."))
        elif fault == "forbid":
            _answer(request, 403, {}, _XML % (b"AccessDenied", b"Not for you."))
        else:
            self._pass_on(request, body, fault)

    def _pass_on(self, request: BaseHTTPRequestHandler, body: bytes, fault: Kind | None) -> None:
        connection = http.client.HTTPConnection(self.server, timeout=20)
        connection.request(request.command, request.path, body, dict(request.headers))
        answer = connection.getresponse()
        data = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "date")}
        connection.close()
        if fault == "lose answer":
            request.close_connection = True
            return
        _answer(request, answer.status, headers, data, sent=len(data) // 2 if fault == "cut answer" else len(data))


def _answer(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, sent: int | None = None
) -> None:
    headers = {name: value for name, value in headers.items() if name.lower() != "transfer-encoding"}
    if request.command != "HEAD" or "Content-Length" not in headers:
        headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
        headers["Content-Length"] = str(len(data))
    request.send_response_only(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data[:sent])
    if sent is not None and sent < len(data):
        request.wfile.flush()
        request.close_connection = True


@contextmanager
def bad_network(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """Leads this process's clients over a network of its own; they try for a second."""
    network = Network(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", network.address)
    monkeypatch.setattr(object_requests, "_clients", {})
    monkeypatch.setattr(object_requests, "RETRY_S", 1.0)
    yield network
    network.close()
