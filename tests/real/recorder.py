# SPDX-License-Identifier: Apache-2.0
"""A second receiver of LiveKit's webhooks, which keeps them unchanged. Tests."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from attrs import field, frozen


@frozen
class Webhook:
    """One webhook as it was on the wire, and when it came, in seconds since the epoch."""

    method: str
    headers: dict[str, str]
    body: bytes = field(repr=False)
    came_at: float

    @property
    def event(self) -> dict[str, Any]:
        """Its content."""
        content: dict[str, Any] = json.loads(self.body)
        return content


class Recorder:
    """Listens on a free port of loopback and answers 200."""

    def __init__(self) -> None:
        self.webhooks: list[Webhook] = []
        heard = self.webhooks

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                heard.append(Webhook(self.command, dict(self.headers), body, time.time()))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def events(self, identity: str, name: str = "") -> list[dict[str, Any]]:
        """The events about one participant so far, of one kind if named."""
        events = [webhook.event for webhook in list(self.webhooks)]
        return [
            event
            for event in events
            if event.get("participant", {}).get("identity") == identity and name in ("", event["event"])
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)
