# SPDX-License-Identifier: Apache-2.0
"""Go's ``net/http`` ServeMux and JSON encoding, which the imitated Go services use. Sandbox.

Read from Go 1.26's ``net/http/server.go``, ``routing_tree.go``, ``net/url`` and ``encoding/json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from lotusguard.sandbox.wire import Reply

NOT_FOUND = Reply(
    404,
    b"404 page not found\n",
    [("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")],
)
BAD_REQUEST = Reply(400, b"400 Bad Request", [("Content-Type", "text/plain; charset=utf-8")])
_HTML_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_UNQUOTED = "$&+,/:;=@"
_VALID_RAW_PATH = re.compile(r"[A-Za-z0-9\-_.~!$&'()*+,;=:@\[\]%/]*")


def marshal(value: Any) -> str:
    """``json.Marshal``: compact, with ``< > &`` and the line separators escaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_HTML_ESCAPES)


def encode(value: Any) -> bytes:
    """``json.NewEncoder(w).Encode``: ``marshal`` and a newline."""
    return (marshal(value) + "\n").encode("utf-8", "replace")


class ServeMux:
    """A mux with exact patterns without method or host.

    :param redirect_status: 307; 301 for programs built with Go 1.25 or older.
    """

    def __init__(self, patterns: Iterable[str], redirect_status: int = 307) -> None:
        self._patterns = {tuple(pattern.split("/")): pattern for pattern in patterns}
        self._redirect_status = redirect_status

    def find(self, path: str, query: str, method: str = "POST") -> str | Reply:
        """The pattern that matches an undecoded path, or the mux's own answer: redirect, 404 or 400."""
        if path == "*":
            return Reply(200 if method == "OPTIONS" else 400)
        if not path.startswith("/") or _BAD_ESCAPE.search(path) or not path.isprintable():
            return BAD_REQUEST
        escaped = path if _VALID_RAW_PATH.fullmatch(path) else _quote(unquote_to_bytes(path.encode("latin-1")))
        cleaned = escaped if method == "CONNECT" else clean_path(escaped)
        if cleaned != escaped:
            # The cleaned path is still escaped and is escaped once more by url.URL.String.
            location = _quote(cleaned.encode("latin-1")) + (f"?{query}" if query else "")
            return self._redirect(location, method)
        segments = tuple(unquote_to_bytes(part).decode("utf-8", "replace") for part in cleaned.split("/"))
        return self._patterns.get(segments, NOT_FOUND)

    def _redirect(self, location: str, method: str) -> Reply:
        if method not in ("GET", "HEAD"):
            return Reply(self._redirect_status, b"", [("Location", location)])
        text = {301: "Moved Permanently", 307: "Temporary Redirect"}[self._redirect_status]
        body = f'<a href="{location.replace("&", "&amp;")}">{text}</a>.\n\n'.encode()
        headers = [("Content-Type", "text/html; charset=utf-8"), ("Location", location)]
        return Reply(self._redirect_status, body, headers)


def clean_path(path: str) -> str:
    """The canonical path: no empty, ``.`` or ``..`` elements; a trailing slash stays."""
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del kept[-1:]
        elif part not in ("", "."):
            kept.append(part)
    return "/" + "/".join(kept) + ("/" if kept and path.endswith("/") else "")


def _quote(path: bytes) -> str:
    return quote(path, safe=_UNQUOTED)
