# SPDX-License-Identifier: Apache-2.0
"""Handing requests on as they came and answers back as they come. Floor: web."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse

from lotusguard.clients.http import Answer
from lotusguard.clients.lk_jwt_service import Forwarded
from lotusguard.web.site import PublicRequest, connection_options

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", b"content-length", b"expect")
)  # fmt: skip
"""RFC 9110 §7.6.1, and what each hop frames anew: length and ``100-continue``."""
_NOT_ON_TOKEN_ROUTES = frozenset((b"accept-encoding", b"range", b"if-range"))
"""What could get a token answered in a form that we cannot read."""
_NOT_IN_A_HEAD = b"\0\r\n"
"""What Twisted's client lets stand in an answer's head although it could end a line of it for somebody else."""


def keep_end_to_end(headers: Headers, without: frozenset[bytes] = frozenset()) -> None:
    """Take out all headers that are not meant for who is at the other end."""
    gone = _HOP_BY_HOP | without | connection_options(headers)
    for name in [name for name, _ in headers.getAllRawHeaders() if name.lower() in gone]:
        headers.removeHeader(name)


def forwarded(request: PublicRequest, body: bytes | None, request_id: str) -> Forwarded:
    """The request as it goes on. Its headers are the caller's own from then on without what stays on this hop.

    :param body: what goes on as its body; ``None`` for none.
    :param request_id: goes along as ``X-Request-ID``.
    """
    headers = request.requestHeaders
    keep_end_to_end(headers, _NOT_ON_TOKEN_ROUTES if request.token_route else frozenset())
    peer = request.getClientIP()
    if peer:
        before = headers.getRawHeaders(b"x-forwarded-for") or []
        headers.setRawHeaders(b"X-Forwarded-For", [b", ".join([*before, peer.encode("ascii")])])
    headers.setRawHeaders(b"X-Request-ID", [request_id.encode("ascii")])
    return Forwarded(request.method, request.uri, headers, body)


def has_body(request: PublicRequest) -> bool:
    """Whether the request came with a body, be it an empty one."""
    framed = (b"content-length", b"transfer-encoding")
    return any(request.requestHeaders.hasHeader(name) for name in framed)


def _head(request: PublicRequest, code: int, phrase: bytes | None, headers: Headers) -> None:
    request.defaultContentType = None
    request.setResponseCode(code, phrase and phrase.translate(None, _NOT_IN_A_HEAD))
    keep_end_to_end(headers)
    for name, values in headers.getAllRawHeaders():
        request.responseHeaders.setRawHeaders(name, [value.translate(None, _NOT_IN_A_HEAD) for value in values])


def give(request: PublicRequest, answer: Answer) -> None:
    """Answer with a whole answer of upstream."""
    _head(request, answer.code, None, answer.headers)
    if request.method != b"HEAD" and answer.code not in (204, 304):
        request.setHeader(b"Content-Length", str(len(answer.body)).encode())
    request.write(answer.body)
    request.finish()


async def relay(request: PublicRequest, response: IResponse, clock: IReactorTime, idle: float) -> None:
    """Answer with upstream's answer as it comes, as fast as the caller takes it.

    :param idle: seconds for which upstream may send nothing. The caller's connection is dropped then, as it is when
        the answer ends too early: that is what a broken answer looks like.
    """
    _head(request, response.code, response.phrase, response.headers)
    if response.length is not UNKNOWN_LENGTH and request.method != b"HEAD" and response.code not in (204, 304):
        request.responseHeaders.setRawHeaders(b"Content-Length", [b"%d" % response.length])
    relaying = _Relaying(request, clock, idle)
    response.deliverBody(relaying)
    await relaying.done


class _Relaying(Protocol, TimeoutMixin):
    """Hands an answer's body to the caller, with back pressure."""

    def __init__(self, request: PublicRequest, clock: IReactorTime, idle: float) -> None:
        self._request = request
        self._idle = idle
        self._producing = False
        self._ended = False
        self.callLater = clock.callLater  # type: ignore[method-assign,assignment]
        self.done: Deferred[None] = Deferred(lambda _: self._caller_gone())

    def connectionMade(self) -> None:
        self.setTimeout(self._idle)
        if self.transport is not None and hasattr(self.transport, "pauseProducing"):
            self._request.registerProducer(self.transport, True)
            self._producing = True

    def dataReceived(self, data: bytes) -> None:
        self.resetTimeout()
        if not self._ended:
            self._request.write(data)

    def timeoutConnection(self) -> None:
        self._leave()
        self._drop()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.setTimeout(None)
        if self._ended:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self._end()
            self._request.finish()
            self.done.callback(None)
        else:
            self._drop()

    def _drop(self) -> None:
        if not self._ended:
            self._end()
            self._request.channel.forceAbortClient()
            self.done.callback(None)

    def _caller_gone(self) -> None:
        self._ended = True  # there is nobody left to tell how it goes on
        self._leave()

    def _leave(self) -> None:
        """Hang up on upstream."""
        self.setTimeout(None)
        if self.transport is not None:
            self.transport.loseConnection()

    def _end(self) -> None:
        self._ended = True
        if self._producing:
            self._request.unregisterProducer()
