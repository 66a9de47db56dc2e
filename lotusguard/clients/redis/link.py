# SPDX-License-Identifier: Apache-2.0
"""One connection to Redis that is made again whenever it is lost.

txredisapi gives up reconnecting for good after an error during authentication, so only its protocol is used here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import random
from typing import Any, Generic, TypeVar

import txredisapi
from attrs import define, field, frozen
from hiredis import pack_command
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.logger import Logger

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.address import endpoint_for
from lotusguard.clients.redis.faults import ADVICE, NAME, NOT_CONNECTED, reason_of
from lotusguard.clients.redis.patience import Unanswered
from lotusguard.clients.waiting import Deadline, fire_all
from lotusguard.rules.redis_address import HostPort, RedisAddress

log = Logger()

CONNECT_TIMEOUT = 5.0
"""Seconds for a connection, authentication included."""
RETRY_FIRST, RETRY_LAST = 0.1, 2.0
"""Seconds between two attempts: the first pause, doubled up to the last."""
JITTER = 0.25
OLDEST_VERSION = (6, 2)
ANSWERS = b"+-:$*"
"""Each answer of Redis begins with one of these bytes. An HTTP server, for instance, begins with an H."""


@frozen
class ServerInfo:
    """The server that a connection leads to.

    :ivar epoch: changes when the server may have another data set: it was restarted, or another one took over. A
        server that runs changes it too when its replication ID changes.
    :ivar uptime: seconds since the server was started.
    """

    epoch: str
    version: tuple[int, ...]
    master: bool
    uptime: float


class _Events:
    """Mixed into txredisapi's protocols: authentication is ours, and the end of the connection is an event.

    :ivar untrusted: whether the connection ended because of the server's certificate.
    :ivar answered: whether anything was received. :ivar other_program: whether Redis would not have sent that.
    """

    untrusted = False
    answered = other_program = False

    def dataReceived(self, data: bytes, unpause: bool = False) -> None:
        if not self.answered:
            self.answered, self.other_program = True, data[:1] not in ANSWERS
        if self.other_program:
            self.transport.abortConnection()  # type: ignore[attr-defined]
            return
        super().dataReceived(data, unpause)  # type: ignore[misc]

    def connectionMade(self) -> None:
        self._ready = True
        self.lost: Deferred[None] = Deferred()

    def connectionLost(self, reason: Any) -> None:
        self.untrusted = reason.check(SSL.Error, VerificationError) is not None
        super().connectionLost(reason)  # type: ignore[misc]
        lost, self.lost = self.lost, Deferred()
        lost.callback(None)


class CommandProtocol(_Events, txredisapi.RedisProtocol):  # type: ignore[misc]
    """A connection for commands. What txredisapi does for transactions and pipelines with each command is left out."""

    unanswered: Unanswered

    def execute_command(self, *words: str | bytes | int, **_: Any) -> Deferred[Any]:
        if not self.connected:
            raise txredisapi.ConnectionError("Not connected")
        self.transport.write(pack_command(words))  # type: ignore[arg-type]  # its stub allows one word
        return self.unanswered.sent()

    def dataReceived(self, data: bytes, unpause: bool = False) -> None:
        self.unanswered.received()
        super().dataReceived(data, unpause)

    def replyReceived(self, reply: Any) -> None:
        self.unanswered.answer(reply)

    def connectionLost(self, reason: Any) -> None:
        super().connectionLost(reason)
        self.unanswered.lose(txredisapi.ConnectionError("Lost connection"))


class SubscriberProtocol(_Events, txredisapi.SubscriberProtocol):  # type: ignore[misc]
    """A connection that receives what is published."""

    on_message: Callable[[str, str], None]

    def messageReceived(self, pattern: str | None, channel: str, message: str) -> None:
        self.on_message(channel, message)


P = TypeVar("P", bound="CommandProtocol | SubscriberProtocol")


@define(eq=False)
class Link(Generic[P]):
    """Keeps one connection.

    :param ready: prepares a new connection before anybody uses it; if it fails, the connection is closed.
    :param timeout: seconds without any answer until a command fails.
    :param first: the other link to the same server. It says in the log what happens to both.
    :ivar protocol: the connection; ``None`` while there is none.
    :ivar fault: why there is none.
    """

    _address: RedisAddress
    _protocol: type[P]
    _ready: Callable[[P, ServerInfo], Awaitable[None]]
    _reactor: Any
    _timeout: float
    _first: Link[Any] | None = field(default=None, kw_only=True)
    protocol: P | None = field(init=False, default=None)
    fault: str = field(init=False, default=NOT_CONNECTED)
    _said: str = field(init=False, default="")
    _running: Deferred[None] | None = field(init=False, default=None)
    _wanted: bool = field(init=False, default=False)
    _waiting: list[Deferred[None]] = field(init=False, factory=list)

    def start(self) -> None:
        self._wanted = True
        self._running = Deferred.fromCoroutine(self._run())
        self._running.addErrback(lambda failure: failure.trap(CancelledError) and None)

    def stop(self) -> None:
        self._wanted = False
        self.drop()
        if self._running is not None:
            self._running.cancel()

    async def connected(self, seconds: float) -> None:
        """Wait so long for a connection. :raises DependencyFailed: there is none."""
        if self.protocol is None:
            waiting: Deferred[None] = Deferred()
            self._waiting.append(waiting)
            try:
                await waiting.addTimeout(seconds, self._reactor)
            except TimeoutError:
                raise DependencyFailed(NAME, self.fault or NOT_CONNECTED) from None

    def drop(self) -> None:
        """Close the connection; a new one is made."""
        if self.protocol is not None:
            self.protocol.transport.abortConnection()

    async def _run(self) -> None:
        pause = RETRY_FIRST
        while self._wanted:
            try:
                protocol = await self._connect()
            except CancelledError:
                raise
            except Exception as error:
                self._failed(reason_of(error))
            else:
                pause, self.protocol, self.fault = RETRY_FIRST, protocol, ""
                waiting, self._waiting = self._waiting, []
                fire_all(waiting, None)
                self._said = ""
                if self._first is None:
                    log.info("connected to Redis at {server}", server=self._address.name, event_name="redis_connected")
                try:
                    await _copy(protocol.lost)
                finally:
                    self.protocol = None
                self._failed("connection_lost")
            await deferLater(self._reactor, pause * (1 + JITTER * random()))
            pause = min(2 * pause, RETRY_LAST)

    def _failed(self, reason: str) -> None:
        self.fault = reason
        is_new = reason != self._said and self._wanted
        if is_new and (self._first is None or self._first.protocol is not None):
            self._said = reason
            log.error(
                "no connection to Redis at {server} for {what}: {reason}. {advice}",
                what="commands" if self._first is None else "messages", server=self._address.name, reason=reason,
                advice=ADVICE.get(reason, ""), event_name="redis_lost",
            )  # fmt: skip

    async def _connect(self) -> P:
        deadline = Deadline.after(self._reactor, CONNECT_TIMEOUT)
        server = await self._find_server(deadline)
        protocol: P = await deadline.wait(self._open(self._protocol, server))
        try:
            await deadline.wait(Deferred.fromCoroutine(self._prepare(protocol)))
        except BaseException as error:
            protocol.transport.abortConnection()
            if protocol.untrusted:
                raise DependencyFailed(NAME, "bad_certificate") from error
            if protocol.other_program:
                raise DependencyFailed(NAME, "not_redis") from error
            raise
        return protocol

    async def _prepare(self, protocol: P) -> None:
        address = self._address
        if address.password:
            await protocol.execute_command("AUTH", *([address.user] if address.user else []), address.password)
        if address.database:
            await protocol.execute_command("SELECT", address.database)
        info = read_info(await protocol.execute_command("INFO"))
        if info.version < OLDEST_VERSION:
            raise DependencyFailed(NAME, "wrong_version")
        if not info.master:
            raise DependencyFailed(NAME, "read_only")
        await self._ready(protocol, info)

    async def _find_server(self, deadline: Deadline) -> HostPort | None:
        """The server to connect to; ``None`` for a UNIX socket. Sentinels are asked one after the other."""
        address = self._address
        if not address.service:
            return address.servers[0] if address.servers else None
        for sentinel in address.servers:
            part = deadline.sooner(CONNECT_TIMEOUT / len(address.servers))
            try:
                protocol = await part.wait(self._open(CommandProtocol, sentinel))
            except (TimeoutError, ConnectError, DNSLookupError):
                continue
            try:
                if address.sentinel_password:
                    await part.wait(protocol.execute_command("AUTH", address.sentinel_password))
                asked = protocol.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service)
                found = await part.wait(asked)
            except (TimeoutError, txredisapi.RedisError):
                continue
            finally:
                protocol.transport.abortConnection()
            if found:
                return HostPort(found[0], int(found[1]))
        raise DependencyFailed(NAME, "no_master")

    def _open(self, protocol: type[Any], server: HostPort | None) -> Deferred[Any]:
        def build() -> Any:
            made = protocol(charset="utf-8", convertNumbers=False)
            if isinstance(made, CommandProtocol):
                made.unanswered = Unanswered(self._reactor, self._timeout)
            return made

        factory = Factory.forProtocol(build)
        factory.noisy = False
        return endpoint_for(self._reactor, self._address, server, CONNECT_TIMEOUT).connect(factory)


def _copy(event: Deferred[None]) -> Deferred[None]:
    """A Deferred of one's own for an event that others wait for too."""
    copy: Deferred[None] = Deferred()
    event.addCallback(lambda _: None if copy.called else copy.callback(None))
    return copy


def read_info(text: str) -> ServerInfo:
    """Read the answer to ``INFO``."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    version = tuple(int(part) for part in fields.get("redis_version", "0").split(".") if part.isdecimal())
    epoch = f"{fields.get('run_id', '')[:16]}.{fields.get('master_replid', '')[:16]}"
    return ServerInfo(
        epoch, version, fields.get("role", "master") == "master", float(fields.get("uptime_in_seconds", "0"))
    )
