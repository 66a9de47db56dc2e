# SPDX-License-Identifier: Apache-2.0
"""HTTP as raw bytes for tests: a client, and an upstream that records what it receives and answers with given bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from attrs import frozen
from twisted.internet import reactor as twisted_reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

reactor: Any = twisted_reactor
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@frozen
class Response:
    """One answer as received."""

    code: int
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for key, value in self.headers if key.lower() == name]

    def json(self) -> Any:
        return json.loads(self.body)


class Connection(Protocol):
    """A client's connection; the bytes received are in ``received``."""

    def __init__(self) -> None:
        self.received = b""
        self.closed: Deferred[None] = Deferred()
        self.open = True

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.open = False
        self.closed.callback(None)

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def drop(self) -> None:
        """Drop the connection."""
        if self.transport is not None:
            self.transport.abortConnection()  # type: ignore[attr-defined]

    def responses(self) -> list[Response]:
        """The complete answers so far."""
        return parsed(self.received)[0]


async def connect(url: str) -> Connection:
    """Connect to the host and port of a URL."""
    from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol

    host, _, port = url.removeprefix("http://").partition(":")
    connection: Connection = await connectProtocol(TCP4ClientEndpoint(reactor, host, int(port)), Connection())
    return connection


async def exchange(url: str, payload: bytes, seconds: float = 30.0) -> list[Response]:
    """Send bytes and wait until the other side closes. The test fails if it does not within ``seconds``.

    The payload should say ``Connection: close`` in its last request.
    """
    connection = await connect(url)
    connection.send(payload)
    try:
        await connection.closed.addTimeout(seconds, reactor)
    except Exception:
        connection.drop()
        raise AssertionError(f"neither answered nor closed: {connection.received!r}") from None
    answers, rest = parsed(connection.received)
    assert not rest, f"half an answer: {rest!r}"
    return answers


def parsed(received: bytes) -> tuple[list[Response], bytes]:
    """Complete answers, and the remaining bytes. An answer without framing extends to the end."""
    answers = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        if not end:
            break
        status, *lines = head.split(b"\r\n")
        assert status.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), f"no status line: {status!r}"
        headers = [tuple(part.strip() for part in line.decode("latin-1").split(":", 1)) for line in lines]
        names = {name.lower(): value for name, value in headers}
        code = int(status.split(b" ")[1])
        if code < 200 or code in (204, 304) or rest.startswith(b"HTTP/1."):
            body = b""  # to a HEAD, in the last case
        elif "chunked" in names.get("transfer-encoding", ""):
            body, whole, rest = _chunks(rest)
            if not whole:
                break
        else:
            length = int(names["content-length"]) if "content-length" in names else len(rest)
            if len(rest) < length:
                break
            body, rest = rest[:length], rest[length:]
        received = rest
        if code != 100:
            answers.append(Response(code, headers, body))  # type: ignore[arg-type]
    return answers, received


def _chunks(data: bytes) -> tuple[bytes, bool, bytes]:
    body = b""
    while True:
        line, end, data = data.partition(b"\r\n")
        size = int(line.split(b";")[0], 16) if end else -1
        if size < 0 or len(data) < size + 2:
            return body, False, data
        body, data = body + data[:size], data[size + 2 :]
        if size == 0:
            return body, True, data


class Recorder(Factory):
    """An upstream that records every byte and answers each request with the same given bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.connections: list[_Recording] = []
        self.url = ""

    def buildProtocol(self, addr: object) -> _Recording:
        connection = _Recording(self)
        self.connections.append(connection)
        return connection

    @property
    def requests(self) -> list[bytes]:
        """Head and body of each request, as received."""
        return [request for connection in self.connections for request in connection.requests]

    @property
    def unverifiable(self) -> bytes:
        """What was received besides complete requests."""
        return b"".join(connection.buffer for connection in self.connections)


class _Recording(Protocol):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.buffer = b""
        self.requests: list[bytes] = []

    def dataReceived(self, data: bytes) -> None:
        self.buffer += data
        while True:
            head, end, rest = self.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-len")]
            length = int(lengths[0]) if lengths else 0
            if len(rest) < length:
                return
            self.requests.append(head + end + rest[:length])
            self.buffer = rest[length:]
            if self.transport is not None:
                self.transport.write(self.recorder.answer)


@asynccontextmanager
async def recorder(answer: bytes = OK) -> AsyncIterator[Recorder]:
    """A `Recorder` that listens on a free port of loopback."""
    recording = Recorder(answer)
    port = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(recording)
    recording.url = f"http://127.0.0.1:{port.getHost().port}"
    try:
        yield recording
    finally:
        await port.stopListening()
        for connection in recording.connections:
            if connection.transport is not None:
                connection.transport.abortConnection()  # type: ignore[attr-defined]


__all__ = ["CancelledError", "Connection", "Recorder", "Response", "connect", "exchange", "parsed", "recorder"]
