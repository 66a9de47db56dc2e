# SPDX-License-Identifier: Apache-2.0
"""One discipline for calling dependencies: a deadline, a bounded body, no redirects, no cookies. Floor: clients.

Requests go straight to Twisted's agent and bodies are collected by treq. ``treq.HTTPClient`` would parse every URL
through hyperlink and idna again (a fifth of a join's CPU time) and carry one caller's cookies to the next; the
addresses here come from the configuration and never change.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar, cast

import treq
from attrs import field, frozen
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

T = TypeVar("T")

IDLE_CONNECTIONS = 512
"""Connections kept open to one dependency; Twisted's own default is two. With fewer, a burst of joins makes a new one
for most of its calls, which costs a third of a join."""


NEXT_ADDRESS = 0.02
"""Seconds after which the next address of a name is tried beside the first. Twisted's own 0.3 is also how late it
notices that the last address refused: each join would wait that long for a dependency that is down."""


class BodyTooLarge(Exception):
    """An answer is longer than we are willing to hold."""


@frozen
class Answer:
    """A complete HTTP answer."""

    code: int
    headers: Headers
    body: bytes = field(repr=False)


@implementer(IBodyProducer)
class BytesBody:
    """A request body that is in memory already."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.length = len(body)

    def startProducing(self, consumer: Any) -> Deferred[None]:
        consumer.write(self.body)
        done: Deferred[None] = Deferred()
        done.callback(None)
        return done

    def pauseProducing(self) -> None: ...
    def resumeProducing(self) -> None: ...
    def stopProducing(self) -> None: ...


def connection_pool(reactor: Any) -> HTTPConnectionPool:
    """The pool of connections that all clients of one service share; close it with ``closeCachedConnections``."""
    pool = HTTPConnectionPool(reactor, persistent=True)
    pool.maxPersistentPerHost = IDLE_CONNECTIONS
    pool.cachedConnectionTimeout = 30
    return pool


@implementer(IAgent)
class FixedAgent(Agent):
    """An agent for one configured address, whose targets go on the wire byte for byte.

    ``Agent.request`` takes URLs apart and puts them gather again, which loses an empty query and costs time. No
    redirect is followed; TLS is verified by the system's roots where the address is ``https``.

    :param base: the address without a trailing slash; a path in it goes before every target.
    :param connect_timeout: seconds for connecting, where requests have no deadline. Where they have one it would come
        first, and make a dependency that is late look like one that is away.
    """

    def __init__(self, reactor: Any, base: str, pool: HTTPConnectionPool, connect_timeout: float | None = None) -> None:
        super().__init__(reactor, pool=pool)
        uri = self._uri = URI.fromBytes(base.encode("ascii"))
        self._prefix = uri.path.rstrip(b"/")
        host = uri.host.decode("ascii")
        connecting = _endpoint(reactor, host, uri.port, connect_timeout)
        trust = BrowserLikePolicyForHTTPS().creatorForNetloc(uri.host, uri.port) if uri.scheme == b"https" else None
        self._fixed = connecting if trust is None else wrapClientTLS(trust, connecting)
        self._key = (uri.scheme, uri.host, uri.port)

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: Any = None
    ) -> Deferred[IResponse]:
        """:param uri: a request target such as ``/path?query``, not a whole URI."""
        return self._requestWithEndpoint(
            self._key, self._fixed, method, self._uri, headers, bodyProducer, self._prefix + uri
        ).addErrback(_plainly_cancelled)


def _endpoint(reactor: Any, host: str, port: int, timeout: float | None) -> IStreamClientEndpoint:
    """Where to connect. An address needs no resolving, for which Twisted makes a class at each connection: 9 kB that
    only the garbage collector takes away again."""
    if isIPAddress(host):
        return TCP4ClientEndpoint(reactor, host, port, timeout)  # type: ignore[arg-type]  # None is for ever
    if isIPv6Address(host):
        return TCP6ClientEndpoint(reactor, host, port, timeout)
    return HostnameEndpoint(reactor, host, port, timeout, attemptDelay=NEXT_ADDRESS)  # type: ignore[arg-type]


def _plainly_cancelled(failure: Failure) -> Failure:
    """A cancelled request fails with `CancelledError`, which Twisted wraps in what was interrupted by it."""
    reasons = getattr(failure.value, "reasons", ())
    if failure.check(ConnectingCancelledError) or any(reason.check(CancelledError) for reason in reasons):
        raise CancelledError
    return failure


async def collected(response: IResponse, limit: int) -> bytes:
    """The body of a response, read whole. Cancelled, it drops the connection.

    :raises BodyTooLarge: it is longer than ``limit`` bytes; the connection is dropped.
    """
    parts: list[bytes] = []
    size = 0

    def part(chunk: bytes) -> None:
        nonlocal size
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge
        parts.append(chunk)

    abortable = _Abortable(response)
    try:
        await treq.collect(cast(IResponse, abortable), part)
    except CancelledError:
        abortable.abort()
        raise
    return b"".join(parts)


class _Abortable:
    """A response whose delivery can be broken off; treq would wait on for a body that never ends."""

    def __init__(self, response: IResponse) -> None:
        self._response = response
        self.length = response.length
        self._receiver: Any = None

    def deliverBody(self, receiver: Any) -> None:
        self._receiver = receiver
        self._response.deliverBody(receiver)

    def abort(self) -> None:
        transport = getattr(self._receiver, "transport", None)
        if transport is not None:
            transport.loseConnection()


def json_object(answer: Answer) -> dict[str, Any]:
    """The JSON object in an answer. :raises ValueError: there is none."""
    content = json.loads(answer.body)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content
