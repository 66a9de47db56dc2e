# SPDX-License-Identifier: Apache-2.0
"""How requests are received: bounded in size and time, routed on the one spelling of their path."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from typing import Any
from urllib.parse import quote

from klein import Klein
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.http_headers import Headers
from twisted.web.server import Request, Site

from lotusguard.clients.http import connection_options
from lotusguard.rules.requests import TokenRoute, canonical_path
from lotusguard.web.answers import MANY_HOSTS, NO_ROOM_FOR_BODY, NOT_A_PATH, TOO_LARGE, AnsweredRequest, Reply, refuse
from lotusguard.web.bodies import RELAYED_FACTOR, SMALL, BodyPool, caller_of

RECEIVE_TIMEOUT = 60
"""Seconds from a connection's last answer (or its beginning) until the next request is complete."""
DISCARDED = 64 * 1024 * 1024
"""Bytes of a refused body that are read and thrown away, so that its sender gets a proper answer, before the
connection is closed."""
_TARGET = re.compile(rb"/[!-\"$-~]*")
"""A request target: a path, perhaps a query, no fragment."""


class Channel(HTTPChannel):
    """An HTTPChannel whose timeout covers the whole request; receiving data does not reset it."""

    site: GuardSite
    _host: IAddress

    def connectionMade(self) -> None:
        super().connectionMade()
        self.site.channels.add(self)
        self._host = super().getHost()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.site.channels.discard(self)
        super().connectionLost(reason)

    def getHost(self) -> IAddress:
        """Our end's address, asked of the kernel once; Twisted would ask at each request."""
        return self._host

    def checkPersistence(self, request: Request, version: bytes) -> bool:
        """Whether the connection stays open after this request: not while the listener closes.

        Twisted overlooks a ``close`` that is not the only option in the header.
        """
        if b"close" in connection_options(request.requestHeaders):
            request.responseHeaders.setRawHeaders(b"Connection", [b"close"])
            return False
        return bool(super().checkPersistence(request, version)) and not self.site.closing

    def headerReceived(self, line: bytes) -> bool:
        try:
            return bool(super().headerReceived(line))
        except ValueError:  # a Content-Length of more digits than Python reads
            self._respondToBadRequestAndDisconnect()
            return False

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Headers) -> None:
        """Write the head of an answer in one piece; Twisted gives the transport each name and each value by itself."""
        lines = [name + b": " + value for name, values in headers.getAllRawHeaders() for value in values]
        self.write(b"\r\n".join([b" ".join((version, code, reason)), *lines, b"", b""]))

    def lineLengthExceeded(self, line: bytes) -> None:
        """A request line or a header is too long."""
        self._respondToBadRequestAndDisconnect()

    def resetTimeout(self) -> None:
        """Not reset: the time until a request is complete is bounded, however slowly it arrives."""


class GuardRequest(AnsweredRequest):
    """A request whose body is kept in memory, within the site's pool.

    :ivar canonical_path: the one spelling of its path.
    :ivar asks_for_token: whether it is a POST to a token route; other methods there are relayed.
    :ivar answering: the Deferred of its answer, cancelled if the caller disconnects.
    """

    site: GuardSite
    content: Any
    canonical_path: str
    asks_for_token: bool
    answering: Deferred[None] | None = None
    _refused: Reply | None = None
    _size = 0
    _taken = 0
    _caller: str | None = None

    def gotLength(self, length: int | None) -> None:
        self.site = self.channel.site
        self.content = BytesIO()
        self.notifyFinish().addCallbacks(self._over, self._abandoned)

    def _over(self, _: object = None) -> None:
        self.drop_body()
        self.site.over(self)

    def _abandoned(self, _: Failure) -> None:
        if self.answering is not None:
            self.answering.cancel()
        self._over()

    def drop_body(self) -> None:
        """The body is not needed any more."""
        if self._taken:
            self.site.pool.give_back(self._caller or "", self._taken)
            self._taken = 0
        self.content = BytesIO()

    def handleContentChunk(self, data: bytes) -> None:
        self._size += len(data)
        if self._refused is None:
            self._refused = self._keep(data)
            if self._refused is not None:
                self.drop_body()
        if self._refused is not None and self._size > self.site.pool.largest + DISCARDED:
            self.channel.loseConnection()

    def _keep(self, data: bytes) -> Reply | None:
        """Keep a part of the body. :return: why the body cannot be kept, if so."""
        pool = self.site.pool
        if self._size > pool.largest:
            return TOO_LARGE
        counted = min(len(data), self._size - SMALL)
        if counted > 0:
            if self._caller is None:
                forwarded_for = self.requestHeaders.getRawHeaders(b"x-forwarded-for") or [b""]
                self._caller = caller_of(self.getClientIP(), forwarded_for[-1])
            if not pool.take(self._caller, counted):
                return NO_ROOM_FOR_BODY
            self._taken += counted
        self.content.write(data)
        return None

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """The request is complete. Unlike Twisted's own method, this parses no forms: no handler wants them, and a
        long one would block the reactor."""
        self.content.seek(0)
        self.args: dict[bytes, list[bytes]] = {}
        self.method, self.uri, self.clientproto = command, path, version
        self.path = path.partition(b"?")[0]
        self.site.in_flight.add(self)
        self.process()

    def body(self) -> bytes:
        """The whole body."""
        return bytes(self.content.getvalue())

    def process(self) -> None:
        """Refuse it, or hand it to the site."""
        self.canonical_path = canonical_path(self.path)
        self.token_route = self.site.token_route(self.canonical_path)
        self.asks_for_token = self.token_route is not None and self.method == b"POST"
        reply = self._malformed()
        if reply is None:
            self.site.dispatch(self)
        else:
            self.drop_body()
            if reply in _REJECTED_BODIES:
                self.site.rejected(_REJECTED_BODIES[reply])
            refuse(self, reply)

    def _malformed(self) -> Reply | None:
        if not _TARGET.fullmatch(self.uri):
            return NOT_A_PATH
        if len(self.requestHeaders.getRawHeaders(b"host") or ()) > 1:
            return MANY_HOSTS
        if self._refused is None and self.asks_for_token and self._size > self.site.max_body:
            return TOO_LARGE
        return self._refused

    def getRequestHostname(self) -> bytes:
        """For Klein's map of routes, which does not need the caller's ``Host`` and rejects some."""
        return b"lotusguard"

    def getClientIP(self) -> str | None:
        return getattr(self.getClientAddress(), "host", None)


_REJECTED_BODIES = {TOO_LARGE: "too_large", NO_ROOM_FOR_BODY: "no_room"}


def _no_token_route(path: str) -> TokenRoute | None:
    return None


class GuardSite(Site):
    """A site for Klein routes.

    :param max_body: bytes that the body of a token request may have; any other may have `RELAYED_FACTOR` times that.
    :param token_route: finds the token route of a path in its one spelling.
    :param rejected: counts refused bodies, by ``too_large`` or ``no_room``.
    :param answer_token: answers token requests without Klein, whose routing costs 17 % of a join. It must call the
        handler that Klein has for the same route.
    """

    protocol = Channel  # type: ignore[assignment]
    displayTracebacks = False
    noisy = False
    """The listener's own line says where it listens."""

    def __init__(
        self,
        app: Klein,
        reactor: Any,
        *,
        max_body: int,
        token_route: Callable[[str], TokenRoute | None] = _no_token_route,
        answer_token: Callable[[GuardRequest], None] | None = None,
        rejected: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(app.resource(), requestFactory=GuardRequest, timeout=RECEIVE_TIMEOUT, reactor=reactor)
        self.max_body = max_body
        self.token_route = token_route
        self.rejected = rejected
        self.pool = BodyPool(max_body * RELAYED_FACTOR)
        self.channels: set[Channel] = set()
        self.in_flight: set[GuardRequest] = set()
        """Complete requests that are not answered yet."""
        self.closing = False
        self._answer_token = answer_token
        self._waiting_until_empty: list[Deferred[None]] = []

    def dispatch(self, request: GuardRequest) -> None:
        """Answer a well-formed request."""
        if self._answer_token is not None and request.asks_for_token:
            self._answer_token(request)
        else:
            self.route(request)

    def route(self, request: GuardRequest) -> None:
        """Answer by Klein's routes. They match ``postpath``, quoted so that every path is printable ASCII."""
        request.prepath = []
        request.postpath = quote(request.canonical_path).encode("ascii").split(b"/")[1:]
        request.render(self.resource)

    async def emptied(self) -> None:
        """Wait until no request is being answered."""
        if self.in_flight:
            waiter: Deferred[None] = Deferred()
            self._waiting_until_empty.append(waiter)
            await waiter

    def over(self, request: GuardRequest) -> None:
        """A request has been answered, or its caller has disconnected."""
        self.in_flight.discard(request)
        if not self.in_flight and self._waiting_until_empty:
            waiters, self._waiting_until_empty = self._waiting_until_empty, []
            for waiter in waiters:
                waiter.callback(None)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        channel: Any = super().buildProtocol(addr)
        channel.requestFactory = self.requestFactory
        channel.site = self
        return channel

    def log(self, request: Any) -> None:
        """No access log: targets can hold secrets, and decisions have log lines of their own."""
