# SPDX-License-Identifier: Apache-2.0
"""A bare relay: Twisted's own HTTP server and client with nothing between them.

Sends the body of each request to upstream, and the answer back. It decides, counts and logs nothing. This is what any
HTTP proxy in Twisted costs; the rest of what a join costs is the guard's.
"""

from __future__ import annotations

import os
from typing import Any

from twisted.internet import reactor
from twisted.web.client import readBody
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from lotusguard.clients.http import BytesBody, FixedAgent, connection_pool
from lotusguard.process import raise_file_limit

_HEADERS = Headers({b"Content-Type": [b"application/json"]})


class Relay(Resource):
    """Every path, every method."""

    isLeaf = True

    def __init__(self, agent: FixedAgent) -> None:
        super().__init__()
        self._agent = agent

    def render(self, request: Any) -> int:
        body = request.content.read()
        asked = self._agent.request(request.method, request.uri, _HEADERS, BytesBody(body) if body else None)
        asked.addCallback(self._answered, request)
        return NOT_DONE_YET

    def _answered(self, response: Any, request: Any) -> None:
        request.setResponseCode(response.code)
        readBody(response).addCallback(self._read, request)

    def _read(self, body: bytes, request: Any) -> None:
        request.setHeader(b"Content-Length", b"%d" % len(body))
        request.write(body)
        request.finish()


def main() -> None:
    raise_file_limit()
    loop: Any = reactor
    agent = FixedAgent(loop, os.environ["GUARD_UPSTREAM"], connection_pool(loop), 15)
    site = Site(Relay(agent))
    site.log = lambda request: None  # type: ignore[method-assign]
    loop.listenTCP(int(os.environ["GUARD_BIND_PORT"]), site, backlog=1024, interface=os.environ["GUARD_BIND_HOST"])
    loop.run()


if __name__ == "__main__":
    main()
