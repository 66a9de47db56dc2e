# SPDX-License-Identifier: Apache-2.0
"""How requests are received: bounded in size and time, routed on the decoded path, kept as they came. Floor: web."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from typing import Any
from urllib.parse import unquote_to_bytes

from klein import Klein
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.http_headers import Headers
from twisted.web.resource import IResource
from twisted.web.server import Request, Site

from lotusguard.rules.requests import TOKEN_ROUTES, TokenRoute, canonical_path
from lotusguard.web.answers import refuse

RECEIVE_TIMEOUT = 60
"""Seconds from a connection's last answer (or its beginning) until the next request is there, whole."""
DISCARDED = 64 * 1024 * 1024
"""Bytes of a body that are read and thrown away for the sake of a proper 413, before we just hang up."""
HELD = 256
"""How many bodies of the greatest length are held at once, all in all, be they whole or on their way."""
_TARGET = re.compile(rb"/[!-\"$-~]*")
"""What a request target looks like: a path, perhaps a query, no fragment."""
WEBHOOK_PATH = "/sfu_webhook"
RELAY_PATH = "/relay"
"""Where Klein sends everything that is nobody's route in particular."""


def connection_options(headers: Headers) -> set[bytes]:
    """What ``Connection`` names: options, and headers that are for the next hop only."""
    values = headers.getRawHeaders(b"connection") or ()
    return {option.strip().lower() for value in values for option in value.split(b",")}


class Channel(HTTPChannel):
    """Twisted's channel, for which the arrival of a byte is no reason to wait for the next one any longer."""

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
        """Our end's address, which stays what it is: Twisted would ask the kernel at each request."""
        return self._host

    def checkPersistence(self, request: Request, version: bytes) -> bool:
        """Whether the connection stays open after this request: not when we are about to leave.

        Twisted overlooks a ``close`` that is not the only thing in the header.
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

    def lineLengthExceeded(self, line: bytes) -> None:
        """A request line or a header that is too long."""
        self._respondToBadRequestAndDisconnect()

    def resetTimeout(self) -> None:
        """Not reset: the time until a request is there is bounded as a whole, however slowly it trickles in."""


class GuardRequest(Request):
    """A request that keeps its body in memory, up to the site's limit."""

    site: GuardSite
    channel: Any
    content: Any
    cors = False
    """Whether its answers carry CORS headers."""
    answering: Deferred[None] | None = None
    """What answers it, and need not go on when its caller has gone."""
    _size = 0
    _held = 0

    def gotLength(self, length: int | None) -> None:
        self.site = self.channel.site
        self.content = BytesIO()
        self.notifyFinish().addCallbacks(self._over, self._abandoned)

    def _over(self, _: object = None) -> None:
        self.site.held -= self._held
        self.site.over(self)

    def _abandoned(self, _: Failure) -> None:
        if self.answering is not None:
            self.answering.cancel()
        self._over()

    def handleContentChunk(self, data: bytes) -> None:
        self._size += len(data)
        site = self.site
        if self._size <= site.max_body and site.held + len(data) <= site.max_body * HELD:
            self.content.write(data)
            self._held += len(data)
            site.held += len(data)
        elif self._size <= site.max_body or self._size > site.max_body + DISCARDED:
            self.channel.loseConnection()

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """It is whole. Unlike Twisted's own, this reads no forms: nobody here wants them, taking a long one apart
        holds everybody up, and a broken one would not be handed on."""
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
        """Route it. What cannot be routed is refused here, because Klein would do worse with it."""
        self.prepath: list[bytes] = []
        self.postpath = self.segments()
        if not _TARGET.fullmatch(self.uri):
            refuse(self, 400, "M_UNRECOGNIZED", "The request target is no path.", cors=self.cors)
        elif len(self.requestHeaders.getRawHeaders(b"host") or ()) > 1:
            refuse(self, 400, "M_UNRECOGNIZED", "There is more than one Host.", cors=self.cors)
        elif self._size > self.site.max_body:
            refuse(self, 413, "M_TOO_LARGE", "The request is too large.", cors=self.cors)
        else:
            self.routed()

    def routed(self) -> None:
        """Answer it."""
        self.render(self.site.resource)

    def segments(self) -> list[bytes]:
        """The path that Klein finds the route by, in its decoded segments."""
        return [unquote_to_bytes(segment) for segment in self.path.split(b"/")[1:]]

    def getRequestHostname(self) -> bytes:
        """For Klein's map of routes, which has no use for what a caller writes there and trips over some of it."""
        return b"lotusguard"

    def getClientIP(self) -> str | None:
        return getattr(self.getClientAddress(), "host", None)


class PublicRequest(GuardRequest):
    """A request at the public door: routed on what its path comes to, however it is written, and handed on as it came.

    :ivar token_route: the token route it goes to, if it does.
    """

    site: PublicSite
    token_route: TokenRoute | None = None

    def routed(self) -> None:
        """Token requests, whose route is known by now, do not go through Klein: that would be a sixth of their cost."""
        if self.token_route is not None:
            self.site.answer_token(self)
        else:
            super().routed()

    def segments(self) -> list[bytes]:
        path = canonical_path(self.path)
        self.token_route = TOKEN_ROUTES.get(path)
        self.cors = self.token_route is not None and self.token_route.cors
        known = self.token_route is not None or path == WEBHOOK_PATH
        return (path if known else RELAY_PATH).encode("ascii").split(b"/")[1:]


class GuardSite(Site):
    """A site for Klein routes.

    :param max_body: bytes a request's body may have.
    """

    protocol = Channel  # type: ignore[assignment]
    displayTracebacks = False

    def __init__(self, app: Klein, reactor: Any, *, max_body: int, request: type[GuardRequest] = GuardRequest) -> None:
        resource: IResource = app.resource()
        super().__init__(resource, requestFactory=request, timeout=RECEIVE_TIMEOUT, reactor=reactor)
        self.max_body = max_body
        self.held = 0
        """Bytes of all bodies that are in memory."""
        self.channels: set[Channel] = set()
        self.in_flight: set[GuardRequest] = set()
        """Requests that are whole and not answered."""
        self._emptied: list[Deferred[None]] = []
        self.closing = False

    async def emptied(self) -> None:
        """Wait until no request is being answered."""
        if self.in_flight:
            waiter: Deferred[None] = Deferred()
            self._emptied.append(waiter)
            await waiter

    def over(self, request: GuardRequest) -> None:
        """A request has been answered, or its caller has gone."""
        self.in_flight.discard(request)
        if not self.in_flight and self._emptied:
            waiters, self._emptied = self._emptied, []
            for waiter in waiters:
                waiter.callback(None)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        channel: Any = super().buildProtocol(addr)
        channel.requestFactory = self.requestFactory
        channel.site = self
        return channel

    def log(self, request: Any) -> None:
        """No access log: targets can carry what no log should hold, and decisions have lines of their own."""


class PublicSite(GuardSite):
    """The public door's site.

    :param answer_token: answers what came for a token route.
    """

    def __init__(
        self, app: Klein, answer_token: Callable[[PublicRequest], None], reactor: Any, *, max_body: int
    ) -> None:
        super().__init__(app, reactor, max_body=max_body, request=PublicRequest)
        self.answer_token = answer_token
