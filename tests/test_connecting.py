# SPDX-License-Identifier: Apache-2.0
"""Connecting to a dependency that is down costs a join next to nothing, to one that is swamped its deadline."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.error import ConnectError
from twisted.web.client import HTTPConnectionPool
from twisted.web.http_headers import Headers

from lotusguard.clients.dependency import Dependency, DependencyFailed
from lotusguard.clients.http import FixedAgent, collected, connection_pool
from lotusguard.clients.lk_jwt_service import Forwarded, LkJwtService, UpstreamFailed
from lotusguard.metrics import Metrics
from lotusguard.sandbox.synapse.homeserver import FakeSynapse

NOTICEABLE = 0.25
"""Seconds. Twisted's ``HostnameEndpoint`` as it comes takes 0.3."""


@pytest_twisted.async_yield_fixture
async def pool() -> AsyncIterator[HTTPConnectionPool]:
    pool = connection_pool(reactor)
    yield pool
    await pool.closeCachedConnections()


def free_port() -> int:
    with socket.socket() as trying:
        trying.bind(("127.0.0.1", 0))
        port: int = trying.getsockname()[1]
        return port


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_a_refused_connection_is_noticed_at_once(pool: HTTPConnectionPool, host: str) -> None:
    agent = FixedAgent(reactor, f"http://{host}:{free_port()}", pool, 5)
    await _refused(agent)  # the resolver's threads are up now
    began = reactor.seconds()
    await _refused(agent)
    assert reactor.seconds() - began < NOTICEABLE


@pytest.fixture
def overwhelmed() -> Iterator[int]:
    """A port whose queue of connections is full: nobody is refused and nobody gets in."""
    with ExitStack() as sockets:
        listening = sockets.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_neighbour_that_lets_nobody_in_is_late_and_not_away(
    pool: HTTPConnectionPool, overwhelmed: int, host: str
) -> None:
    agent = FixedAgent(reactor, f"http://{host}:{overwhelmed}", pool)
    upstream = LkJwtService(agent, reactor, Metrics(), timeout=0.3, grace=5)
    with pytest.raises(UpstreamFailed) as late:
        await upstream.ask(Forwarded(b"POST", b"/sfu/get", Headers(), b"{}"))
    assert late.value.code == 504
    livekit = Dependency("livekit", agent, reactor, Metrics(), timeout=0.3)
    with pytest.raises(DependencyFailed) as failed:
        await livekit.call(b"GET", b"/", Headers(), read=lambda answer: answer)
    assert failed.value.reason == "timeout"


async def _refused(agent: FixedAgent) -> None:
    with pytest.raises(ConnectError):
        await agent.request(b"GET", b"/")


@pytest_twisted.ensureDeferred
async def test_a_name_with_an_address_that_refuses_is_reached_by_the_other(pool: HTTPConnectionPool) -> None:
    homeserver = FakeSynapse(reactor)
    await homeserver.start()  # on 127.0.0.1 only; localhost may be ::1 as well
    try:
        agent = FixedAgent(reactor, f"http://localhost:{homeserver.port}", pool, 5)
        response = await agent.request(b"GET", b"/_matrix/client/versions")
        assert b"versions" in await collected(response, 10_000)
    finally:
        await homeserver.stop()
