# SPDX-License-Identifier: Apache-2.0
"""Forwarding requests to upstream, and relaying its answers as they arrive."""

from __future__ import annotations

import re

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH

from lotusguard.clients.http import Answer, keep_end_to_end
from lotusguard.clients.lk_jwt_service import mark
from lotusguard.web.answers import CORS
from lotusguard.web.site import GuardRequest

_NOT_ON_TOKEN_ROUTES = (b"range", b"if-range")
"""Request headers that could get a token answered in a form that we cannot read."""
_NOT_IN_A_HEAD = b"\0\r\n"
"""Characters of a reason phrase that somebody may read as the end of the line."""
_IDENTITY = re.compile(rb"x[-_]matrix[-_]", re.IGNORECASE)
"""Headers by which a homeserver names a user or itself; from anybody else they prove nothing."""
_NO_SFU = b'"Unable to create room on SFU"'
"""What lk-jwt-service says in a 500 when LiveKit does not answer."""


def forwarded_headers(request: GuardRequest, request_id: str, *, keep_identity: bool = False) -> Headers:
    """The headers with which a request is forwarded. Changes the request's own.

    :param request_id: sent as ``X-Request-ID``.
    :param keep_identity: whether ``X-Matrix-*`` headers are forwarded; they are a homeserver's word.
    """
    headers = request.requestHeaders
    keep_end_to_end(headers)
    if not keep_identity:
        for name in [name for name, _ in headers.getAllRawHeaders() if _IDENTITY.match(name)]:
            headers.removeHeader(name)
    if request.asks_for_token:
        for name in _NOT_ON_TOKEN_ROUTES:
            headers.removeHeader(name)
        headers.setRawHeaders(b"Accept-Encoding", [b"identity"])
    peer = request.getClientIP()
    if peer:
        before = headers.getRawHeaders(b"x-forwarded-for") or []
        headers.setRawHeaders(b"X-Forwarded-For", [b", ".join([*before, peer.encode("ascii")])])
    headers.setRawHeaders(b"X-Request-ID", [request_id.encode("ascii")])
    mark(headers)
    return headers


def has_body(request: GuardRequest) -> bool:
    """Whether the request came with a body, even an empty one."""
    framed = (b"content-length", b"transfer-encoding")
    return any(request.requestHeaders.hasHeader(name) for name in framed)


def _head(request: GuardRequest, code: int, phrase: bytes | None, headers: Headers) -> None:
    """:param headers: become the request's own."""
    request.defaultContentType = None
    request.setResponseCode(code, phrase and phrase.translate(None, _NOT_IN_A_HEAD))
    for name, values in request.responseHeaders.getAllRawHeaders():
        if not headers.hasHeader(name):
            headers.setRawHeaders(name, values)
    request.responseHeaders = headers


def give(request: GuardRequest, answer: Answer) -> None:
    """Answer with a complete answer of upstream's; with its body only if an early head was sent.

    That LiveKit could not be asked is told without CORS headers: it may be restarting. The browser hides the answer
    from Element Call then, which asks again for half a minute; with the headers any error is final, and one in a
    running call ends it for this person.
    """
    if request.early_head:
        request.write(answer.body)
        request.finish()
        return
    _head(request, answer.code, None, answer.headers)
    if answer.code == 500 and _NO_SFU in answer.body:
        for name in CORS:
            request.responseHeaders.removeHeader(name)
    if request.method != b"HEAD" and answer.code not in (204, 304):
        request.setHeader(b"Content-Length", str(len(answer.body)).encode())
    request.write(answer.body)
    request.finish()


async def relay(request: GuardRequest, response: Answer, clock: IReactorTime, idle: float) -> None:
    """Relay upstream's answer as it arrives, as fast as the caller reads it.

    :param idle: seconds for which upstream may send nothing. Then the caller's connection is dropped, as it is when the
        answer ends too early, so that the caller can tell that it is incomplete.
    """
    _head(request, response.code, response.phrase, response.headers)
    if response.length is not UNKNOWN_LENGTH and request.method != b"HEAD" and response.code not in (204, 304):
        request.responseHeaders.setRawHeaders(b"Content-Length", [b"%d" % response.length])
    relaying = _Relaying(request, clock, idle)
    response.deliverBody(relaying)
    await relaying.done


@define(slots=False, eq=False)
class _Relaying(Protocol, TimeoutMixin):
    """Passes an answer's body to the caller, with back pressure.

    :ivar done: fires when the body is relayed or cannot be; cancelled when the caller disconnects.
    """

    _request: GuardRequest
    _clock: IReactorTime
    _idle: float
    _producing: bool = False
    _ended: bool = False
    done: Deferred[None] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.callLater = self._clock.callLater  # type: ignore[method-assign,assignment]
        self.done = Deferred(lambda _: self._caller_disconnected())

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
        self._close()
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

    def _caller_disconnected(self) -> None:
        self._ended = True
        self._close()

    def _close(self) -> None:
        """Close the connection to upstream."""
        self.setTimeout(None)
        if self.transport is not None:
            self.transport.loseConnection()

    def _end(self) -> None:
        self._ended = True
        if self._producing:
            self._request.unregisterProducer()
