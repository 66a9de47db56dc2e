# SPDX-License-Identifier: Apache-2.0
"""The guard to compare with: a thread for each connection, a connection for each lookup.

Written like small guards on ``http.server``: it enforces the limit alone, asks LiveKit on every join, in JSON, and
caches a room's limit for ten seconds. It reads the same environment variables as lotusguard.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

LOOKUP_TIMEOUT = 5.0
UPSTREAM_TIMEOUT = 15.0
LIMIT_TTL = 10.0
TOKEN_PATHS = ("/sfu/get", "/get_token")
NOT_RELAYED = {"connection", "content-length", "date", "server", "transfer-encoding"}
FULL = json.dumps({"errcode": "M_FORBIDDEN", "error": "This voice channel is full."}).encode()

_upstream = os.environ.get("GUARD_UPSTREAM", "")
_livekit = os.environ.get("LIVEKIT_API", "")
_synapse = os.environ.get("SYNAPSE_API", "")
_key = os.environ.get("LIVEKIT_KEY", "")
_secret = os.environ.get("LIVEKIT_SECRET", "").encode()
_matrix_token = os.environ.get("MATRIX_TOKEN", "")

_limits: dict[str, tuple[int, float]] = {}
_limits_lock = threading.Lock()


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _admin_token(alias: str) -> str:
    now = int(time.time())
    claims = {"iss": _key, "nbf": now - 10, "exp": now + 120, "video": {"roomAdmin": True, "room": alias}}
    signed = ".".join(_encoded(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    return signed + "." + _encoded(hmac.digest(_secret, signed.encode(), "sha256"))


def _user(identity: str) -> str:
    parts = identity.split(":", 2)
    return ":".join(parts[:2]) if identity.startswith("@") and len(parts) == 3 else identity


def limit_of(room_id: str) -> int:
    """The room's ``max_users``, 0 for none; cached for ten seconds."""
    now = time.time()
    with _limits_lock:
        limit, until = _limits.get(room_id, (0, 0.0))
    if until > now:
        return limit
    limit = 0
    request = Request(
        f"{_synapse}/_synapse/admin/v1/rooms/{quote(room_id, safe='')}/state",
        headers={"Authorization": f"Bearer {_matrix_token}"},
    )
    try:
        with urlopen(request, timeout=LOOKUP_TIMEOUT) as response:
            for event in json.loads(response.read())["state"]:
                if event["type"] == "io.lotus.voice_limit" and not event.get("state_key"):
                    limit = int(event["content"].get("max_users") or 0)
    except Exception:
        return 0  # it fails open
    with _limits_lock:
        _limits[room_id] = (limit, now + LIMIT_TTL)
    return limit


def users_in(alias: str) -> set[str]:
    """The users in the SFU room."""
    request = Request(
        f"{_livekit}/twirp/livekit.RoomService/ListParticipants",
        json.dumps({"room": alias}).encode(),
        {"Authorization": f"Bearer {_admin_token(alias)}", "Content-Type": "application/json"},
    )
    with urlopen(request, timeout=LOOKUP_TIMEOUT) as response:
        return {_user(participant["identity"]) for participant in json.loads(response.read()).get("participants", ())}


def is_full(limit: int, answer: bytes) -> bool:
    """Whether there is no seat for the user of this token."""
    payload = json.loads(answer)["jwt"].split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    present = users_in(claims["video"]["room"])
    return _user(claims["sub"]) not in present and len(present) >= limit


class Handler(BaseHTTPRequestHandler):
    """One connection, in its own thread."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a kept-alive caller waits 40 ms for each answer's body

    def log_message(self, *args: Any) -> None: ...

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        limit = 0
        if self.command == "POST" and self.path in TOKEN_PATHS:
            try:
                limit = limit_of(json.loads(body)["room"])
            except (ValueError, KeyError):
                limit = 0
        status, headers, answer = self._forward(body)
        if limit > 0 and status == 200:
            try:
                if is_full(limit, answer):
                    status, answer = 403, FULL
            except Exception:
                limit = 0  # it fails open
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in NOT_RELAYED:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_OPTIONS = do_POST = do_PUT = handle_any

    def _forward(self, body: bytes) -> tuple[int, Any, bytes]:
        headers = {name: self.headers[name] for name in ("Content-Type", "Accept", "Origin") if name in self.headers}
        data = body if self.command in ("POST", "PUT") else None
        request = Request(_upstream + self.path, data, headers, method=self.command)
        try:
            with urlopen(request, timeout=UPSTREAM_TIMEOUT) as response:
                return response.status, response.headers, response.read()
        except HTTPError as error:
            return error.code, error.headers, error.read()


class Peer(ThreadingHTTPServer):
    """A thread for each connection."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    host = os.environ.get("GUARD_BIND_HOST", "127.0.0.1")
    Peer((host, int(os.environ.get("GUARD_BIND_PORT", "8070"))), Handler).serve_forever()


if __name__ == "__main__":
    main()
