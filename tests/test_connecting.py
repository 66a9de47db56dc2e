# SPDX-License-Identifier: Apache-2.0
"""`FixedAgent` over real sockets: targets are sent as they are, refused connections are noticed at once, and a
dependency that accepts no connections is late, not down."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import ConnectError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.tcp import Server as TCPServer
from twisted.web import server
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource

from lotusguard.clients.dependency import Dependency, DependencyFailed
from lotusguard.clients.http import ConnectionPool, FixedAgent, StaleConnection, fetch
from lotusguard.clients.lk_jwt_service import Forwarded, LkJwtService, UpstreamFailed
from lotusguard.metrics import Metrics
from lotusguard.sandbox.synapse.homeserver import FakeSynapse

NOTICEABLE = 0.25
"""Seconds. Twisted's ``HostnameEndpoint`` takes 0.3 by default."""


@pytest_twisted.async_yield_fixture
async def pool() -> AsyncIterator[ConnectionPool]:
    pool = ConnectionPool(reactor)
    yield pool
    await pool.close()


def free_port() -> int:
    with socket.socket() as trying:
        trying.bind(("127.0.0.1", 0))
        port: int = trying.getsockname()[1]
        return port


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_a_refused_connection_is_noticed_at_once(pool: ConnectionPool, host: str) -> None:
    agent = FixedAgent(reactor, f"http://{host}:{free_port()}", pool, 5)
    await _refused(agent)  # starts the resolver's threads
    began = reactor.seconds()
    await _refused(agent)
    assert reactor.seconds() - began < NOTICEABLE


@pytest.fixture
def overwhelmed() -> Iterator[int]:
    """A port whose queue of connections is full: connections are neither refused nor accepted."""
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
async def test_a_dependency_that_accepts_no_connections_is_late_and_not_down(
    pool: ConnectionPool, overwhelmed: int, host: str
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
async def test_a_host_name_is_reached_by_its_second_address_if_the_first_refuses(pool: ConnectionPool) -> None:
    homeserver = FakeSynapse(reactor)
    await homeserver.start()  # on 127.0.0.1 only; localhost may be ::1 as well
    try:
        agent = FixedAgent(reactor, f"http://localhost:{homeserver.port}", pool, 5)
        answer = await fetch(agent, b"GET", b"/_matrix/client/versions", Headers(), limit=10_000)
        assert b"versions" in answer.body
    finally:
        await homeserver.stop()


class Forgetful(Protocol):
    """Answers the first request of each connection, and closes it without an answer when the next one arrives."""

    def connectionMade(self) -> None:
        self.answered = False

    def dataReceived(self, data: bytes) -> None:
        if self.answered:
            assert isinstance(self.transport, TCPServer)
            self.transport.abortConnection()
        else:
            self.answered = True
            assert self.transport is not None
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest_twisted.ensureDeferred
async def test_only_a_question_is_asked_again_if_a_kept_connection_is_closed(pool: ConnectionPool) -> None:
    listening = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(Factory.forProtocol(Forgetful))
    try:
        agent = FixedAgent(reactor, f"http://127.0.0.1:{listening.getHost().port}", pool)
        for _ in range(3):
            assert (await fetch(agent, b"GET", b"/", Headers(), limit=10)).body == b"ok"
        with pytest.raises(StaleConnection):
            await fetch(agent, b"POST", b"/", Headers(), b"{}", limit=10)
    finally:
        await listening.stopListening()


class Recorder(Resource):
    """Answers with the target and the Host header of each request; ``/silent`` is never answered."""

    isLeaf = True

    def render(self, request: server.Request) -> bytes | int:
        if request.uri == b"/silent":
            return server.NOT_DONE_YET
        assert request.content is not None
        hosts = request.requestHeaders.getRawHeaders(b"host") or []
        return b" ".join([request.method, request.uri, *hosts, request.content.read()])


@pytest_twisted.async_yield_fixture
async def recorder() -> AsyncIterator[int]:
    """The port of a server that echoes requests."""
    port = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(server.Site(Recorder()))
    yield port.getHost().port
    await port.stopListening()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("target", [b"/a?", b"/a%2Fb//c/../d?x=%20;y", b"/?#", b"/_synapse/!room:server"])
async def test_targets_are_sent_byte_for_byte(pool: ConnectionPool, recorder: int, target: bytes) -> None:
    agent = FixedAgent(reactor, f"http://127.0.0.1:{recorder}/prefix", pool)
    answer = await fetch(agent, b"PUT", target, Headers({b"X": [b"y"]}), b"body", limit=1000)
    assert answer.body == b"PUT /prefix%b 127.0.0.1:%d body" % (target, recorder)


@pytest_twisted.ensureDeferred
async def test_a_cancelled_request_fails_as_cancelled(pool: ConnectionPool, recorder: int) -> None:
    asked = FixedAgent(reactor, f"http://127.0.0.1:{recorder}", pool).request(b"GET", b"/silent")
    reactor.callLater(0.1, asked.cancel)
    with pytest.raises(CancelledError):
        await asked
