# SPDX-License-Identifier: Apache-2.0
"""The load balancer of the soak tries another guard if one cannot be reached, and only then."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as twisted_reactor
from twisted.internet.defer import maybeDeferred
from twisted.web.client import ResponseNeverReceived
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import Site

from lotusguard.clients.http import ConnectionPool, FixedAgent, fetch
from tests.guardprocess import free_port
from tests.soak.balancer import Balancer

reactor: Any = twisted_reactor


class Server(Resource):
    """:ivar asked: how many requests came. :ivar silent: connections end without an answer."""

    isLeaf = True
    asked = 0
    silent = False

    def render_GET(self, request: Any) -> bytes:
        self.asked += 1
        if self.silent:
            request.transport.abortConnection()
        return b"hello"


@asynccontextmanager
async def balanced(server: Server, *others: int) -> AsyncIterator[Any]:
    """:return: asks through a balancer before the server and other ports."""
    listening = reactor.listenTCP(0, Site(server), interface="127.0.0.1")
    balancer = Balancer(reactor, [listening.getHost().port, *others], Random(0))
    balanced = await balancer.listen()
    agent = FixedAgent(reactor, balancer.url, ConnectionPool(reactor, at_most=0))
    try:
        yield lambda: fetch(agent, b"GET", b"/", Headers(), limit=100).addTimeout(30, reactor)
    finally:
        await maybeDeferred(balanced.stopListening)
        await listening.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_request_reaches_the_guard_that_listens() -> None:
    server = Server()
    async with balanced(server, free_port(), free_port()) as ask:
        for _ in range(10):
            assert (await ask()).body == b"hello"
    assert server.asked == 10


@pytest_twisted.ensureDeferred
async def test_a_request_that_was_sent_is_sent_once() -> None:
    server = Server()
    server.silent = True
    async with balanced(server, free_port()) as ask:
        with pytest.raises(ResponseNeverReceived):
            await ask()
    assert server.asked == 1
