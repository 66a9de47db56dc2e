# SPDX-License-Identifier: Apache-2.0
"""A bare relay: Twisted's own HTTP server and client with nothing between them.

Sends the body of each request to upstream, and the answer back. It decides, counts and logs nothing. This is what any
HTTP proxy in Twisted costs; the rest of what a join costs is the guard's.

``RELAY_LOOKUPS`` makes it ask the homeserver as often as the guard does for a join of somebody whom it does not know:
one call after the other, whose answers it throws away.
"""

from __future__ import annotations

import os
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.web.client import URI, Agent, HTTPConnectionPool, readBody
from twisted.web.http_headers import Headers
from twisted.web.iweb import IBodyProducer, IResponse
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import implementer

from lotusguard.clients.http import IDLE_CONNECTIONS
from lotusguard.process import raise_file_limit, tune_garbage_collector

_JSON = Headers({b"Content-Type": [b"application/json"]})
_LOOKUP = b"/_synapse/admin/v1/users/%40user0%3Abench.local/joined_rooms"


@implementer(IBodyProducer)
class BytesBody:
    """A request body that is in memory."""

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


class OneAddress(Agent):
    """Twisted's agent without what a relay can do without: it parses no URL for each request."""

    def __init__(self, loop: Any, base: str, pool: HTTPConnectionPool) -> None:
        super().__init__(loop, pool=pool)
        self._uri = URI.fromBytes(base.encode())
        self._fixed: IStreamClientEndpoint = TCP4ClientEndpoint(loop, self._uri.host.decode(), self._uri.port)
        self._key = (self._uri.scheme, self._uri.host, self._uri.port)

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        return self._requestWithEndpoint(self._key, self._fixed, method, self._uri, headers, bodyProducer, uri)


class Relay(Resource):
    """Every path, every method."""

    isLeaf = True

    def __init__(self, upstream: OneAddress, homeserver: OneAddress, lookups: int) -> None:
        super().__init__()
        self._upstream = upstream
        self._homeserver = homeserver
        self._lookups = lookups
        self._headers = Headers({b"Authorization": [b"Bearer " + os.environ["MATRIX_TOKEN"].encode()]})

    def render(self, request: Any) -> int:
        Deferred.fromCoroutine(self._relay(request))
        return NOT_DONE_YET

    async def _relay(self, request: Any) -> None:
        for _ in range(self._lookups):
            await readBody(await self._homeserver.request(b"GET", _LOOKUP, self._headers))
        body = request.content.read()
        response = await self._upstream.request(request.method, request.uri, _JSON, BytesBody(body) if body else None)
        answer = await readBody(response)
        request.setResponseCode(response.code)
        request.setHeader(b"Content-Length", b"%d" % len(answer))
        request.write(answer)
        request.finish()


def main() -> None:
    raise_file_limit()
    loop: Any = reactor
    pool = HTTPConnectionPool(loop)
    pool.maxPersistentPerHost = IDLE_CONNECTIONS
    upstream = OneAddress(loop, os.environ["GUARD_UPSTREAM"], pool)
    homeserver = OneAddress(loop, os.environ["SYNAPSE_API"], pool)
    site = Site(Relay(upstream, homeserver, int(os.environ.get("RELAY_LOOKUPS", "0"))))
    site.log = lambda request: None  # type: ignore[method-assign]
    loop.listenTCP(int(os.environ["GUARD_BIND_PORT"]), site, backlog=1024, interface=os.environ["GUARD_BIND_HOST"])
    loop.callWhenRunning(tune_garbage_collector)
    loop.run()


if __name__ == "__main__":
    main()
