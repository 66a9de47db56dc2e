# SPDX-License-Identifier: Apache-2.0
"""Requests to one configured address.

Addresses come from the configuration and never change: `FixedAgent` parses its address once, and sends the request
targets that it is given byte for byte. ``twisted.web.client.Agent`` takes whole URLs, which it parses and builds again
for each request; an empty query is lost on the way.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure
from twisted.web.client import URI, BrowserLikePolicyForHTTPS
from twisted.web.http_headers import Headers

from lotusguard.clients.http.answer import Answer
from lotusguard.clients.http.connection import Connection, StaleConnection
from lotusguard.clients.http.pool import ConnectionPool

NEXT_ADDRESS = 0.02
"""Seconds after which the next address of a host name is tried too. Twisted's 0.3 is also how late it notices that the
last address refused the connection: each join would wait that long for a dependency that is down."""
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET = re.compile(rb"[\x21-\x7e]+")
_NO_HEADERS = Headers()
_REPEATABLE = (b"GET", b"HEAD")


class FixedAgent:
    """Makes requests to one address. No redirect is followed, no cookie is kept; TLS certificates are verified against
    the system's roots where the address is ``https``.

    :param base: the address without a trailing slash; a path in it goes before every target.
    :param connect_timeout: seconds for connecting, for requests without a deadline. For requests with one it must be
        None: it would pass first, and a dependency that is late would look like one that is down.
    """

    def __init__(self, reactor: Any, base: str, pool: ConnectionPool, connect_timeout: float | None = None) -> None:
        uri = URI.fromBytes(base.encode("ascii"))
        self._prefix = uri.path.rstrip(b"/")
        self._host = b"Host: " + uri.netloc
        self._address = (uri.scheme, uri.host, uri.port)
        self._pool = pool
        self._endpoint = _endpoint(reactor, uri.host.decode("ascii"), uri.port, connect_timeout)
        if uri.scheme == b"https":
            tls = BrowserLikePolicyForHTTPS().creatorForNetloc(uri.host, uri.port)
            self._endpoint = wrapClientTLS(tls, self._endpoint)
        kept, lost = partial(pool.keep, self._address), partial(pool.forget, self._address)
        self._factory = Factory.forProtocol(partial(Connection, kept, lost))

    def request(
        self, method: bytes, target: bytes, headers: Headers | None = None, body: bytes | None = None
    ) -> Deferred[Answer]:
        """Make a request. Cancelled, it drops the connection.

        ``GET`` and ``HEAD`` without a body are sent once more if a connection that was kept open is closed without an
        answer: its other end may have closed it just before.

        :param target: such as ``/path?query``, not a whole URI.
        :return: the answer, when its head is here. See `Connection.ask` for how it may fail; it also fails with what
            the endpoint fails with if there is no connection.
        :raises ValueError: the method or the target has characters that may not be in one.
        """
        request = self._serialized(method, target, headers or _NO_HEADERS, body)
        has_body = method != b"HEAD"
        connection = self._pool.take(self._address)
        if connection is None:
            return self._ask_anew(request, has_body)
        asked = connection.ask(request, has_body=has_body)
        if body is None and method in _REPEATABLE:
            asked.addErrback(self._ask_again, request, has_body)
        return asked

    def _ask_again(self, failure: Failure, request: bytes, has_body: bool) -> Deferred[Answer]:
        failure.trap(StaleConnection)
        return self._ask_anew(request, has_body)

    def _ask_anew(self, request: bytes, has_body: bool) -> Deferred[Answer]:
        """Over a new connection."""
        connecting: Deferred[Any] = self._endpoint.connect(self._factory)
        return connecting.addCallbacks(lambda made: made.ask(request, has_body=has_body), _not_connected)

    def _serialized(self, method: bytes, target: bytes, headers: Headers, body: bytes | None) -> bytes:
        if not _METHOD.fullmatch(method) or not _TARGET.fullmatch(target):
            raise ValueError(f"not a request: {method!r} {target!r}")
        lines = [b"%b %b%b HTTP/1.1" % (method, self._prefix, target)]
        if not headers.hasHeader(b"host"):
            lines.append(self._host)
        lines += [name + b": " + value for name, values in headers.getAllRawHeaders() for value in values]
        if body is not None or method in (b"POST", b"PUT"):
            lines.append(b"Content-Length: %d" % len(body or b""))
        return b"\r\n".join([*lines, b"", body or b""])


def _endpoint(reactor: Any, host: str, port: int, timeout: float | None) -> IStreamClientEndpoint:
    """Where to connect. `HostnameEndpoint` makes a class for each connection, 9 kB that only the collector frees;
    IP addresses need no resolving and do without it."""
    if isIPAddress(host):
        return TCP4ClientEndpoint(reactor, host, port, timeout)  # type: ignore[arg-type]  # None: no timeout
    if isIPv6Address(host):
        return TCP6ClientEndpoint(reactor, host, port, timeout)
    return HostnameEndpoint(reactor, host, port, timeout, attemptDelay=NEXT_ADDRESS)  # type: ignore[arg-type]


def _not_connected(failure: Failure) -> Failure:
    """A request that is cancelled while it connects fails with `CancelledError` too."""
    if failure.check(ConnectingCancelledError):
        raise CancelledError
    return failure
