# SPDX-License-Identifier: Apache-2.0
"""The agent for one configured address: the one place where we go around what is slow in Twisted and treq.

Measured per call on CPython 3.11 with Twisted 26.10 and treq 26.7, an agent that answers from memory: 93 µs of CPU time
through ``treq.client.HTTPClient``, which parses each URL with hyperlink and idna and builds a cookie jar; 9 µs for the
agent alone with ``treq.collect``. A join makes four to eight such calls. Addresses here come from the configuration and
never change, so `FixedAgent` parses its address once and sends the targets that it is given.
"""

from __future__ import annotations

from typing import Any

from attrs import define, field
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool, ResponseNeverReceived
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IResponse
from zope.interface import implementer

IDLE_CONNECTIONS = 512
"""Connections kept open to one dependency; Twisted's default is two. With fewer, most calls in a burst of joins open a
new connection, which costs a third of a join."""
IDLE_TIMEOUT = 30
"""Seconds for which an unused connection stays open."""
NEXT_ADDRESS = 0.02
"""Seconds after which the next address of a host name is tried too. Twisted's 0.3 is also how late it notices that the
last address refused the connection: each join would wait that long for a dependency that is down."""


def connection_pool(reactor: Any) -> HTTPConnectionPool:
    """The pool of connections that all clients of one service share; close it with ``closeCachedConnections``."""
    pool = HTTPConnectionPool(reactor, persistent=True)
    pool.maxPersistentPerHost = IDLE_CONNECTIONS
    pool.cachedConnectionTimeout = IDLE_TIMEOUT
    return pool


class StaleConnection(ResponseNeverReceived):
    """A connection that had been kept open was closed before it brought an answer: its other end may have closed it
    before it saw the request."""


@implementer(IStreamClientEndpoint)
@define(eq=False)
class _Endpoint:
    """The endpoint of one request. :ivar connected: whether a connection was opened for the request."""

    _endpoint: IStreamClientEndpoint
    connected: bool = field(init=False, default=False)

    def connect(self, protocolFactory: Any) -> Deferred[Any]:
        self.connected = True
        connecting: Deferred[Any] = self._endpoint.connect(protocolFactory)
        return connecting


@implementer(IAgent)
class FixedAgent(Agent):
    """An agent for one configured address, whose targets are sent byte for byte.

    ``Agent.request`` parses URLs and rebuilds them, which loses an empty query and costs time; this class calls the
    private ``Agent._requestWithEndpoint`` underneath it. No redirect is followed, no cookie is kept; TLS certificates
    are verified against the system's roots where the address is ``https``.

    :param base: the address without a trailing slash; a path in it goes before every target.
    :param connect_timeout: seconds for connecting, for requests without a deadline. For requests with one it must be
        None: it would pass first, and a dependency that is late would look like one that is down.
    """

    def __init__(self, reactor: Any, base: str, pool: HTTPConnectionPool, connect_timeout: float | None = None) -> None:
        super().__init__(reactor, pool=pool)
        uri = self._uri = URI.fromBytes(base.encode("ascii"))
        self._prefix = uri.path.rstrip(b"/")
        endpoint = _endpoint(reactor, uri.host.decode("ascii"), uri.port, connect_timeout)
        if uri.scheme == b"https":
            endpoint = wrapClientTLS(BrowserLikePolicyForHTTPS().creatorForNetloc(uri.host, uri.port), endpoint)
        self._fixed = endpoint
        self._key = (uri.scheme, uri.host, uri.port)

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: Any = None
    ) -> Deferred[IResponse]:
        """Fails with `StaleConnection` if a connection that was used before brings no answer.

        :param uri: a request target such as ``/path?query``, not a whole URI.
        """
        endpoint = _Endpoint(self._fixed)
        return self._requestWithEndpoint(
            self._key, endpoint, method, self._uri, headers, bodyProducer, self._prefix + uri
        ).addErrback(_explained, endpoint)


def _endpoint(reactor: Any, host: str, port: int, timeout: float | None) -> IStreamClientEndpoint:
    """Where to connect. `HostnameEndpoint` makes a class for each connection, 9 kB that only the collector frees;
    IP addresses need no resolving and do without it."""
    if isIPAddress(host):
        return TCP4ClientEndpoint(reactor, host, port, timeout)  # type: ignore[arg-type]  # None: no timeout
    if isIPv6Address(host):
        return TCP6ClientEndpoint(reactor, host, port, timeout)
    return HostnameEndpoint(reactor, host, port, timeout, attemptDelay=NEXT_ADDRESS)  # type: ignore[arg-type]


def _explained(failure: Failure, endpoint: _Endpoint) -> Failure:
    """Make a cancelled request fail with `CancelledError`. Twisted wraps it in the error of what it interrupted."""
    reasons = getattr(failure.value, "reasons", ())
    if failure.check(ConnectingCancelledError) or any(reason.check(CancelledError) for reason in reasons):
        raise CancelledError
    if failure.check(ResponseNeverReceived) and not endpoint.connected:
        raise StaleConnection(reasons)
    return failure
