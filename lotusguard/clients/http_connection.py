# SPDX-License-Identifier: Apache-2.0
"""One HTTP connection to a dependency.

httptools (llhttp, the parser of Node.js) reads what arrives. Twisted's own client takes four times as many instructions
for a call, which were a fifth of a join. llhttp is also stricter: an answer with two lengths, with a length and a
transfer coding, or with a NUL in a header is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import Factory, define, field
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IProtocol, IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse
from zope.interface import implementer

LARGEST_HEAD = 64 * 1024
"""Bytes after which the head of an answer must be complete, with the interim (1xx) answers before it."""
_OF_THE_CONNECTION = frozenset(
    (b"content-length", b"connection", b"keep-alive", b"te", b"trailers", b"transfer-encoding", b"upgrade",
     b"proxy-connection")
)  # fmt: skip
"""Headers that say how an answer is transferred, and nothing about it."""
_DONE = Failure(ResponseDone())


class StaleConnection(ResponseNeverReceived):
    """A connection that had been kept open was closed before it brought an answer: its other end may have closed it
    before it saw the request."""


class Malformed(Exception):
    """What arrived is no answer, or one that cannot be read."""


@define(eq=False)
class _Reader:
    """Reads one answer after the other. What httptools calls begins with ``on_``.

    :ivar headers: those of the head, as they are written.
    :ivar parts: of the body, until somebody takes them.
    :ivar length: bytes of the body, if the head says so.
    :ivar coding: the transfer coding, if there is one.
    :ivar has_head: whether the head is complete.
    :ivar complete: whether the answer is.
    :ivar keeps_open: whether the connection stays open after it.
    :ivar surplus: whether something followed the answer, for which nobody asked.
    """

    code: int = 0
    phrase: bytes = b""
    headers: list[tuple[bytes, bytes]] = Factory(list)
    parts: list[bytes] = Factory(list)
    length: int | None = None
    coding: bytes = b""
    has_head: bool = False
    complete: bool = False
    keeps_open: bool = False
    surplus: bool = False
    _head_size: int = 0
    _parser: HttpResponseParser = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._parser = HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """:raises Malformed:"""
        if not self.has_head:
            if self._head_size >= LARGEST_HEAD:
                raise Malformed("the head is too long")
            self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self.complete:
                raise Malformed(str(error)) from None
            self.surplus = True
        if self.coding not in (b"", b"chunked"):
            raise Malformed(f"unknown transfer coding {self.coding!r}")

    def next(self) -> None:
        """Make ready for the next answer."""
        self.phrase, self.headers, self.parts, self.length, self.coding = b"", [], [], None, b""
        self.has_head, self.complete, self._head_size = False, False, 0

    def close(self) -> None:
        """The reader and its parser refer to each other, and only the garbage collector would free them."""
        del self._parser

    def on_message_begin(self) -> None:
        self.surplus = self.complete

    def on_status(self, phrase: bytes) -> None:
        if not self.has_head:
            self.phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            return  # a trailer
        value = value.rstrip(b" \t")
        self.headers.append((name, value))
        lowered = name.lower()
        if lowered == b"content-length":
            self.length = int(value)
        elif lowered == b"transfer-encoding":
            self.coding = value.lower()

    def on_headers_complete(self) -> None:
        if not self.has_head:
            self.code = self._parser.get_status_code()
            self.has_head = self.code >= 200

    def on_body(self, part: bytes) -> None:
        if not self.complete:
            self.parts.append(part)

    def on_message_complete(self) -> None:
        if self.complete:
            return
        if self.has_head:
            self.complete, self.keeps_open = True, self._parser.should_keep_alive()
        else:  # an interim answer
            self.phrase, self.headers, self.length, self.coding = b"", [], None, b""


@implementer(IResponse, IPushProducer)
@define(eq=False)
class Answer:
    """An answer, as Twisted and treq know it. Whom its body is delivered to has it as a transport too.

    :ivar length: bytes of the body; ``UNKNOWN_LENGTH`` if its head does not say.
    :ivar body: the whole body, once somebody has read it (`fetch`).
    """

    code: int
    raw_headers: list[tuple[bytes, bytes]] = field(factory=list, repr=False)
    body: bytes = field(default=b"", repr=False)
    phrase: bytes = field(default=b"", kw_only=True)
    length: Any = field(default=UNKNOWN_LENGTH, kw_only=True)
    _parts: list[bytes] = field(factory=list, kw_only=True, repr=False)
    _connection: Connection | None = field(default=None, kw_only=True, repr=False)
    _headers: Headers | None = field(init=False, default=None, repr=False)
    _receiver: IProtocol | None = field(init=False, default=None, repr=False)
    _ended: Failure | None = field(init=False, default=None, repr=False)

    version = (b"HTTP", 1, 1)
    request = None
    previousResponse = None

    @property
    def headers(self) -> Headers:
        """The headers, without those of the connection."""
        if self._headers is None:
            self._headers = Headers()
            for name, value in self.raw_headers:
                if name.lower() not in _OF_THE_CONNECTION:
                    self._headers.addRawHeader(name, value)
        return self._headers

    def header(self, name: bytes) -> bytes:
        """The first header of that name, which is in lower case; ``b""`` if there is none. Makes no `headers`."""
        return next((value for key, value in self.raw_headers if key.lower() == name), b"")

    def read_at_once(self) -> bool:
        """Set `body`, if it is here. :return: False if it is not; then it has to be delivered."""
        if self._connection is not None or self._ended not in (None, _DONE):
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


@define(eq=False, slots=False)
class Connection(Protocol):
    """A connection to a dependency: one request after the other, never two at once.

    :param kept: called when an answer is complete and the next request can be sent.
    :param lost: called when the connection is closed.
    :ivar unused_since: when its last answer was complete, on the clock of whoever keeps it.
    """

    _kept: Callable[[Connection], None]
    _lost: Callable[[Connection], None]
    unused_since: float = 0.0
    _used: bool = False
    _heard: bool = False
    _has_body: bool = True
    _waiting: Deferred[Answer] | None = None
    _response: Answer | None = None
    _aborted: bool = False
    _open: bool = True
    _closed: Deferred[None] | None = None
    _reader: _Reader = Factory(_Reader)

    def ask(self, request: bytes, *, has_body: bool) -> Deferred[Answer]:
        """Send a request. Cancelled, it drops the connection.

        :param has_body: whether the answer may have a body; that to ``HEAD`` has none, whatever its head says.
        :return: fires when the head of the answer is here. Fails with ``ResponseNeverReceived`` (`StaleConnection`
            if the connection brought an answer before) if nothing arrives, and with ``ResponseFailed`` if what arrives
            is not a whole head.
        """
        self._has_body, self._heard = has_body, False
        waiting = self._waiting = Deferred(self._give_up)
        self._transport.write(request)
        return waiting

    @property
    def _transport(self) -> Any:
        return self.transport

    def _give_up(self, _: Deferred[Answer]) -> None:
        self._waiting = None
        self.abort()

    def dataReceived(self, data: bytes) -> None:
        if self._aborted:
            return
        if self._waiting is None and self._response is None:
            self._lost(self)  # nobody asked for this, or nobody wants it any more
            self.abort()
            return
        self._heard = True
        try:
            self._reader.feed(data)
        except Malformed:
            self._fail(Failure())
            self.abort()
            return
        if self._waiting is not None:
            if self._reader.has_head:
                self._answer(self._waiting)
        elif self._response is not None:
            self._continue(self._response)

    def _answer(self, waiting: Deferred[Answer]) -> None:
        """The head is here."""
        reader = self._reader
        length: Any = UNKNOWN_LENGTH if reader.length is None else reader.length
        if not self._has_body:
            length, reader.parts, reader.complete, reader.surplus = 0, [], True, True
        response = Answer(
            reader.code, reader.headers, phrase=reader.phrase, length=length, parts=reader.parts, connection=self
        )
        self._waiting = None
        if reader.complete:
            response.end(_DONE)
            self._release()
            waiting.callback(response)
            return
        reader.parts, self._response = [], response
        waiting.callback(response)
        response.arrived([])

    def _continue(self, response: Answer) -> None:
        """More of the body is here."""
        parts, self._reader.parts = self._reader.parts, []
        complete = self._reader.complete
        response.arrived(parts)
        if complete:
            self._response = None
            self._release()
            response.end(_DONE)

    def _release(self) -> None:
        """The answer is complete: let the next request be sent, or close the connection."""
        if self._aborted:
            return
        if self._reader.surplus or not self._reader.keeps_open:
            self.close()
            return
        self._reader.next()
        self._used = True
        self.resume()
        self._kept(self)

    def _fail(self, reason: Failure) -> None:
        """Whoever waits for an answer, or for the rest of one, gets no more."""
        waiting, self._waiting = self._waiting, None
        response, self._response = self._response, None
        if waiting is not None:
            if self._heard:
                waiting.errback(ResponseFailed([reason]))
            else:
                waiting.errback((StaleConnection if self._used else ResponseNeverReceived)([reason]))
        elif response is not None:
            until_closed = self._reader.length is None and not self._reader.coding
            whole = until_closed and reason.check(ConnectionDone)
            response.end(Failure(PotentialDataLoss() if whole else ResponseFailed([reason], response)))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._fail(reason)
        self._reader.close()
        self._lost(self)
        self._open = False
        if self._closed is not None:
            self._closed.callback(None)

    def close(self) -> None:
        """Close the connection when everything is sent."""
        self._transport.loseConnection()

    def closed(self) -> Deferred[None]:
        """Fires when the connection is closed."""
        if not self._open:
            return succeed(None)
        if self._closed is None:
            self._closed = Deferred()
        return self._closed

    def pause(self) -> None:
        self._transport.pauseProducing()

    def resume(self) -> None:
        self._transport.resumeProducing()

    def abort(self) -> None:
        """Close the connection at once, whatever was to be sent or read."""
        self._aborted = True
        self._transport.abortConnection()
