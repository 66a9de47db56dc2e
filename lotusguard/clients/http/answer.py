# SPDX-License-Identifier: Apache-2.0
"""An answer of a dependency: its head, and its body as it arrives."""

from __future__ import annotations

from typing import Any, Protocol

from attrs import define, field
from twisted.internet.interfaces import IProtocol, IPushProducer
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse
from zope.interface import implementer

from lotusguard.clients.http.headers import keep_end_to_end

DONE = Failure(ResponseDone())


class Source(Protocol):
    """The connection that a body arrives over."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None: ...


@implementer(IResponse, IPushProducer)
@define(eq=False)
class Answer:
    """An answer, as Twisted and treq know it. It is also the transport of the protocol that gets its body.

    :ivar length: bytes of the body; ``UNKNOWN_LENGTH`` if its head does not say.
    :ivar body: the whole body, once somebody has read it (`fetch`).
    """

    code: int
    raw_headers: list[tuple[bytes, bytes]] = field(factory=list, repr=False)
    body: bytes = field(default=b"", repr=False)
    phrase: bytes = field(default=b"", kw_only=True)
    length: Any = field(default=UNKNOWN_LENGTH, kw_only=True)
    _parts: list[bytes] = field(factory=list, kw_only=True, repr=False)
    _connection: Source | None = field(default=None, kw_only=True, repr=False)
    _headers: Headers | None = field(init=False, default=None, repr=False)
    _receiver: IProtocol | None = field(init=False, default=None, repr=False)
    _ended: Failure | None = field(init=False, default=None, repr=False)

    version = (b"HTTP", 1, 1)
    request = None
    previousResponse = None

    @property
    def headers(self) -> Headers:
        """The headers that are not for the connection only."""
        if self._headers is None:
            self._headers = Headers()
            for name, value in self.raw_headers:
                self._headers.addRawHeader(name, value)
            keep_end_to_end(self._headers)
        return self._headers

    def header(self, name: bytes) -> bytes:
        """The first header of that name, which is in lower case; ``b""`` if there is none. Makes no `headers`."""
        return next((value for key, value in self.raw_headers if key.lower() == name), b"")

    def read_at_once(self) -> bool:
        """Set `body`, if it is here. :return: False if it is not; then it has to be delivered."""
        if self._connection is not None or self._ended not in (None, DONE):
            return False
        self.body = self.body or b"".join(self._parts)
        return True

    def setPreviousResponse(self, response: IResponse) -> None:
        raise NotImplementedError("no redirect is followed")

    def deliverBody(self, protocol: IProtocol) -> None:
        """Give the body to a protocol; until then no more than one read of it is kept."""
        self._receiver = protocol
        protocol.makeConnection(self)  # type: ignore[arg-type]  # as Twisted does: no whole transport
        parts, self._parts = self._parts, []
        for part in parts:
            protocol.dataReceived(part)
        if self._ended is not None:
            protocol.connectionLost(self._ended)
        else:
            self.resumeProducing()

    def arrived(self, parts: list[bytes]) -> None:
        """More of the body is here."""
        if self._receiver is None:
            self._parts += parts
            self.pauseProducing()
            return
        for part in parts:
            self._receiver.dataReceived(part)

    def end(self, reason: Failure) -> None:
        """The body is complete (``ResponseDone``), or will never be."""
        self._connection, self._ended = None, reason
        if self._receiver is not None:
            self._receiver.connectionLost(reason)

    def pauseProducing(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resumeProducing(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def stopProducing(self) -> None:
        self.loseConnection()

    def loseConnection(self) -> None:
        """Give up the rest of the body, and the connection with it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
