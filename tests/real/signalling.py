# SPDX-License-Identifier: Apache-2.0
"""The first step of a join, without media: a WebSocket to the SFU, spoken by hand. Tests."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlencode, urlsplit


@contextmanager
def at_the_door(sfu_url: str, token: str, **parameters: str) -> Iterator[int]:
    """Connect, give the status of the answer (101: let in), and hang up in the end."""
    address = urlsplit(sfu_url)
    query = urlencode({"access_token": token, "protocol": "15", **parameters})
    request = [
        f"GET /rtc?{query} HTTP/1.1",
        f"Host: {address.netloc}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
    ]
    with socket.create_connection((address.hostname or "", address.port or 0), 10.0) as connection:
        connection.sendall("\r\n".join([*request, "", ""]).encode())
        with connection.makefile("rb") as answer:
            yield int(answer.readline().split()[1])
