# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy before a Redis server that delays what passes, loses answers, or lets connections lead nowhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from attrs import define, field
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from .guards import reactor


class _Server(Protocol):
    """The connection to Redis. What it sends is passed on late, or not at all."""

    def __init__(self, proxy: SlowProxy, client: _Client) -> None:
        self._proxy, self._client = proxy, client

    def dataReceived(self, data: bytes) -> None:
        if self._proxy.loses_answers:
            self._proxy.lost += 1
            self._client.end()
            return
        reactor.callLater(self._proxy.delay / 2, self._client.pass_on, data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._client.end()


class _Client(Protocol):
    """The connection of a guard."""

    def __init__(self, proxy: SlowProxy) -> None:
        self._proxy = proxy
        self.swallowed = False
        self._server: Any = None
        self._early: list[bytes] = []

    def connectionMade(self) -> None:
        self._proxy.clients.append(self)
        factory = Factory.forProtocol(lambda: _Server(self._proxy, self))
        factory.noisy = False
        HostnameEndpoint(reactor, "127.0.0.1", self._proxy.server).connect(factory).addCallbacks(
            self._connected, lambda _: self.end()
        )

    def _connected(self, server: Any) -> None:
        self._server = server
        for data in self._early:
            self._send(data)

    def dataReceived(self, data: bytes) -> None:
        reactor.callLater(self._proxy.delay / 2, self._send, data)

    def _send(self, data: bytes) -> None:
        if self.swallowed:
            return
        if self._server is None:
            self._early.append(data)
        else:
            self._server.transport.write(data)

    def pass_on(self, data: bytes) -> None:
        if self.connected and not self.swallowed:
            assert self.transport is not None
            self.transport.write(data)

    def end(self) -> None:
        if self.transport is not None:
            self.transport.abortConnection()  # type: ignore[attr-defined]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._server is not None:
            self._server.transport.loseConnection()


@define(eq=False)
class SlowProxy:
    """:ivar server: the port of Redis. :ivar delay: seconds that a round trip takes longer.

    :ivar loses_answers: connections end instead of passing an answer on; the server has done the work.
    :ivar lost: how many answers were lost. :ivar clients: all connections, in the order in which they came.
    """

    server: int
    delay: float = 0.0
    loses_answers: bool = False
    lost: int = 0
    clients: list[_Client] = field(init=False, factory=list)
    _listening: Any = field(init=False)

    def __attrs_post_init__(self) -> None:
        factory = Factory.forProtocol(lambda: _Client(self))
        factory.noisy = False
        self._listening = reactor.listenTCP(0, factory, interface="127.0.0.1")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listening.getHost().port}"

    def swallow(self) -> None:
        """Let the connections that there are lead nowhere, as if the machine had lost its power. New ones work."""
        for client in self.clients:
            client.swallowed = True

    async def stop(self) -> None:
        await self._listening.stopListening()


@asynccontextmanager
async def slow_proxy(server: int, delay: float = 0.0) -> AsyncIterator[SlowProxy]:
    proxy = SlowProxy(server, delay)
    try:
        yield proxy
    finally:
        await proxy.stop()
