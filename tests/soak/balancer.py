# SPDX-License-Identifier: Apache-2.0
"""A load balancer: each connection goes to a guard at random, or to another one if that guard cannot be reached.

What was sent to a guard is never sent to another one. A client whose connections each serve one request has each
request answered by a guard at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.protocols.portforward import ProxyClientFactory, ProxyServer


class _ToGuard(ProxyClientFactory):
    """The connection to a guard. :param ports: of the guards, in the order in which they are tried."""

    noisy = False

    def __init__(self, reactor: Any, ports: Sequence[int]) -> None:
        self._reactor, self._ports = reactor, list(ports)

    def connect(self) -> None:
        self._reactor.connectTCP("127.0.0.1", self._ports.pop(0), self)

    def clientConnectionFailed(self, connector: Any, reason: Any) -> None:
        if self._ports:
            self.connect()
        else:
            super().clientConnectionFailed(connector, reason)


class _FromClient(ProxyServer):
    """The connection from a client. Nothing is read from it before a guard is reached."""

    def connectionMade(self) -> None:
        transport: Any = self.transport
        transport.pauseProducing()
        balancer: Any = self.factory
        to_guard = _ToGuard(balancer.reactor, balancer.dice.sample(balancer.ports, len(balancer.ports)))
        to_guard.setServer(self)
        to_guard.connect()


class Balancer(Factory[Any]):
    """:param ports: of the guards, on loopback. :ivar url: where to reach any of them."""

    noisy = False
    protocol = _FromClient
    url: str

    def __init__(self, reactor: Any, ports: Sequence[int], dice: Random) -> None:
        self.reactor, self.ports, self.dice = reactor, ports, dice

    async def listen(self) -> IListeningPort:
        """Listen on a free port."""
        listening: IListeningPort = await serverFromString(self.reactor, "tcp:0:interface=127.0.0.1").listen(self)
        host: Any = listening.getHost()
        self.url = f"http://127.0.0.1:{host.port}"
        return listening
