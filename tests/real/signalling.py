# SPDX-License-Identifier: Apache-2.0
"""The first step of a join, without media: LiveKit's WebSocket protocol. Tests."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import urlencode, urlsplit

from attrs import frozen
from livekit.protocol.rtc import SignalResponse

PATIENCE = 10.0
"""Seconds to wait for LiveKit."""


@frozen
class Signalling:
    """An open connection, or the answer that refused it.

    :ivar status: of the answer; 101 if the participant was let in.
    """

    status: int
    _stream: BinaryIO

    def refreshed_token(self) -> str:
        """Wait for the next token that LiveKit sends in place of the one that was presented."""
        for response in self._responses():
            if response.WhichOneof("message") == "refresh_token":
                return response.refresh_token
        raise AssertionError("LiveKit closed the connection and sent no token")

    def _responses(self) -> Iterator[SignalResponse]:
        while head := self._stream.read(2):
            length = head[1] & 0x7F
            if length >= 126:
                length = int.from_bytes(self._stream.read(2 if length == 126 else 8), "big")
            payload = self._stream.read(length)
            if head[0] & 0x0F == 2:  # a binary message; LiveKit sends each in one frame
                yield SignalResponse.FromString(payload)


@contextmanager
def signalling(sfu_url: str, token: str, **parameters: str) -> Iterator[Signalling]:
    """Connect to LiveKit with a token; close the connection in the end."""
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
    with socket.create_connection((address.hostname or "", address.port or 0), PATIENCE) as connection:
        connection.sendall("\r\n".join([*request, "", ""]).encode())
        with connection.makefile("rb") as stream:
            status = int(stream.readline().split()[1])
            while stream.readline().strip():
                pass
            yield Signalling(status, stream)
