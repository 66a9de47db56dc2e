# SPDX-License-Identifier: Apache-2.0
"""A web server for a built bundle of Element Call, on ``http://localhost`` so that browsers allow media. Tests."""

from __future__ import annotations

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

MODES = ("legacy", "compatibility", "matrix_2_0")
"""Values of ``matrix_rtc_mode``: how Element Call asks for tokens and announces its participants."""


class Site:
    """One server; each mode has its own configuration and its own origin.

    :param bundle: the folder with ``index.html``.
    :param homeserver_url: the homeserver of everybody who opens the page.
    :param guard_url: where the page asks for tokens.
    """

    def __init__(self, bundle: Path, mode: str, *, homeserver_url: str, server_name: str, guard_url: str) -> None:
        config = {
            "default_server_config": {"m.homeserver": {"base_url": homeserver_url, "server_name": server_name}},
            "livekit": {"livekit_service_url": guard_url},
            "matrix_rtc_mode": mode,
            "matrix_rtc_session": {
                "wait_for_key_rotation_ms": 3000,
                "delayed_leave_event_delay_ms": 18000,
                "delayed_leave_event_restart_ms": 4000,
                "network_error_retry_ms": 100,
            },
        }
        handler = partial(_Handler, directory=str(bundle), config=json.dumps(config).encode())
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def room_url(self, room_id: str) -> str:
        """The page of a room's call. Names of rooms are not needed where the ID is given."""
        return f"{self.url}/room/#/?roomId={quote(room_id, safe='')}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)


class _Handler(SimpleHTTPRequestHandler):
    """Files of the bundle, its configuration, and ``index.html`` for every path of the application."""

    def __init__(self, *args: Any, config: bytes, **how: Any) -> None:
        self._config = config
        super().__init__(*args, **how)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/config.json":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(self._config)))
            self.end_headers()
            self.wfile.write(self._config)
            return
        if not Path(self.translate_path(path)).is_file():
            self.path = "/index.html"
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass
