"""A server for the alerts of the tests. Import `serve`, a fixture."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

VARIABLE = "CHANNEL_METRICS_WEBHOOK"


class Server:
    """A server that answers after a while; `paths` and `bodies` are what was posted."""

    def __init__(self, seconds: float = 0.0, status: int = 200) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.arrived, self.release = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                outer.bodies.append(json.loads(self.rfile.read(length)))
                outer.arrived.set()
                outer.release.wait(seconds)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Print nothing."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/secret-token"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    servers = []

    def start(**options: Any) -> Server:
        servers.append(Server(**options))
        monkeypatch.setenv(VARIABLE, servers[-1].address)
        return servers[-1]

    yield start
    for server in servers:
        server.close()
