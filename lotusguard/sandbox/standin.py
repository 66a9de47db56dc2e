# SPDX-License-Identifier: Apache-2.0
"""The common part of all stand-ins: a listening socket, faults, and a record of the requests. Sandbox.

Stand-ins handle undecoded paths, as the real services do. Klein and the resources of twisted.web decode and clean
them first, so they are not used here.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.client import HTTPConnectionPool

from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.wire import Asked, Refusal, Reply

log = Logger()


class StandIn:
    """An HTTP service on 127.0.0.1 that imitates another one.

    :param clock: the source of time, if not the reactor.
    :param port: the port to listen on; 0 takes a free one and keeps it when listening again.
    :ivar url: base address without a trailing slash, known once started.
    :ivar fault: the fault of every route.
    :ivar faults: faults by route name (see each stand-in's docstring); they override ``fault``.
    :ivar asked: the number of requests by route.
    :ivar seen: the latest requests, oldest first.
    """

    url = ""

    def __init__(self, reactor: Any, *, port: int = 0, clock: Any = None) -> None:
        self.reactor = reactor
        self.clock = reactor if clock is None else clock
        self.port = port
        self.fault: Fault | None = None
        self.faults: dict[str, Fault] = {}
        self.asked: Counter[str] = Counter()
        self.seen: deque[Asked] = deque(maxlen=10_000)
        self.in_flight: set[Deferred[None]] = set()
        self.pool = HTTPConnectionPool(reactor)
        self.pool.maxPersistentPerHost = 64
        self._channels = _Channels(reactor, self)
        self._listening: IListeningPort | None = None

    def route_of(self, asked: Asked) -> str:
        """The name of the route that would handle this request; ``""`` for none."""
        raise NotImplementedError

    async def answer(self, asked: Asked, route: str) -> Reply:
        """Carry out a request as the real service would. :raises Refusal: to answer with an error."""
        raise NotImplementedError

    async def start(self) -> None:
        """Listen; ``url`` is known afterwards."""
        await self.listen()

    async def listen(self) -> None:
        """Listen (again) on the same port."""
        if self._listening is not None:
            return
        endpoint = serverFromString(self.reactor, f"tcp:{self.port}:interface=127.0.0.1")
        self._listening = await endpoint.listen(self._channels)
        address = self._listening.getHost()
        assert isinstance(address, IPv4Address)
        self.port = address.port
        self.url = f"http://127.0.0.1:{self.port}"

    async def stop_listening(self, *, abort: bool = True) -> None:
        """Refuse connections. Open ones are dropped too, unless ``abort`` is false."""
        if self._listening is not None:
            listening, self._listening = self._listening, None
            await maybeDeferred(listening.stopListening)
        if abort:
            await self.drop_connections()

    async def drop_connections(self) -> None:
        """Close all open connections; requests in flight are cancelled."""
        await self._channels.abort_all()

    async def stop(self) -> None:
        """Stop listening, cancel all requests and close all connections."""
        await self.stop_listening()
        for task in list(self.in_flight):
            task.cancel()
        await self.pool.closeCachedConnections()

    def take(self, request: http.Request, asked: Asked) -> None:
        """Handle one request; called by the channel."""
        task = Deferred.fromCoroutine(self._handle(request, asked))
        self.in_flight.add(task)
        request.notifyFinish().addErrback(lambda _: task.cancel())
        task.addErrback(self._log_failure)
        task.addBoth(lambda _: self.in_flight.discard(task))

    def _log_failure(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            log.failure("{standin} failed", failure, standin=type(self).__name__)

    async def _handle(self, request: http.Request, asked: Asked) -> None:
        route = self.route_of(asked)
        self.asked[route] += 1
        self.seen.append(asked)

        async def answer() -> Reply:
            try:
                return await self.answer(asked, route)
            except Refusal as refusal:
                return refusal.reply

        fault = self._applicable(self.fault_for(asked, route))
        try:
            reply = await (fault.spoil(request, self.clock, answer) if fault else answer())
        except CancelledError:
            raise
        except Exception:
            log.failure("{standin} failed at {route}", standin=type(self).__name__, route=route)
            reply = Reply(500)
        if reply is not None and request.channel is not None:
            _send(request, reply)

    def fault_for(self, asked: Asked, route: str) -> Fault | None:
        """The fault that applies to this request, if any."""
        return self.faults.get(route, self.fault)

    def _applicable(self, fault: Fault | None) -> Fault | None:
        if fault is None or fault.times is None:
            return fault
        if fault.times <= 0:
            return None
        fault.times -= 1
        return fault


def _send(request: http.Request, reply: Reply) -> None:
    request.setResponseCode(reply.status)
    headers = request.responseHeaders
    for name, value in reply.headers:
        headers.addRawHeader(name.encode("latin-1"), value.encode("utf-8"))
    if not headers.hasHeader(b"content-length") and (reply.body or request.method != b"HEAD"):
        headers.setRawHeaders(b"Content-Length", [b"%d" % len(reply.body)])
    request.write(reply.body)
    request.finish()


class _Request(http.Request):
    """Hands each complete request to the stand-in, without routing."""

    defaultContentType = None

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Skip twisted.web's parsing of forms; the real services do not parse them."""
        assert self.content is not None
        self.content.seek(0)
        self.method, self.uri, self.clientproto = command, path, version
        self.process()

    def process(self) -> None:
        self.responseHeaders.setRawHeaders(b"Date", [http.datetimeToString()])
        headers = tuple(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, values in self.requestHeaders.getAllRawHeaders()
            for value in values
        )
        assert self.content is not None
        asked = Asked(self.method.decode("latin-1"), self.uri, headers, self.content.read())
        self.channel.factory.standin.take(self, asked)


class _Channel(http.HTTPChannel):
    requestFactory = _Request

    def connectionMade(self) -> None:
        super().connectionMade()
        self.factory.open.add(self)

    def connectionLost(self, reason: Any) -> None:  # type: ignore[override]
        super().connectionLost(reason)
        self.factory.closed(self)


class _Channels(http.HTTPFactory):
    """Keeps track of open connections, so that they can be closed."""

    protocol = _Channel  # type: ignore[assignment]

    def __init__(self, reactor: Any, standin: StandIn) -> None:
        super().__init__(timeout=None, reactor=reactor)  # type: ignore[arg-type]
        self.standin = standin
        self.open: set[_Channel] = set()
        self._waiting: list[Deferred[None]] = []

    def log(self, request: Any) -> None:
        """Log nothing: ``StandIn.seen`` is the record."""

    def closed(self, channel: _Channel) -> None:
        self.open.discard(channel)
        if not self.open:
            waiting, self._waiting = self._waiting, []
            for done in waiting:
                done.callback(None)

    async def abort_all(self) -> None:
        if self.open:
            done: Deferred[None] = Deferred()
            self._waiting.append(done)
            for channel in list(self.open):
                channel.transport.abortConnection()  # type: ignore[union-attr]
            await done
