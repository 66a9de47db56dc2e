# SPDX-License-Identifier: Apache-2.0
"""Calls to Valkey or Redis: every call has a timeout, failures in a row open a circuit, and subscriptions come back."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import txredisapi
from attrs import define, field, frozen
from prometheus_client import Counter
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from lotusguard.clients.circuit_breaker import CircuitBreaker, Prober
from lotusguard.clients.failures import CircuitOpen, DependencyFailed
from lotusguard.clients.lookups import SharedLookups
from lotusguard.clients.redis.faults import ADVICE, NAME, NOT_CONNECTED, reason_of
from lotusguard.clients.redis.link import CommandProtocol, Link, ServerInfo, SubscriberProtocol
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import RedisAddress
from lotusguard.times import Times

log = Logger()

CALL_TIMEOUT = 2.0
"""Seconds without any answer. A script takes less than a millisecond; 0.3 s are a slow network."""
RECONNECT_WAIT = 0.5
"""Seconds for which a call whose connection was lost waits for a new one."""
NO_SCRIPT = "no_script"
PROBE_KEY = "lotusguard:probe"
CALLS_AT_ONCE = 4096
"""Calls that may wait for an answer at the same time."""
QUEUE_FULL = "queue_full"
"""The reason of a call that was not made because so many wait for an answer."""
BUSY_LONGEST, BUSY_POLL = 2.0, 0.05
"""Seconds for which a call is made again while so many wait for an answer, and between two attempts."""
BUSY_ATTEMPTS = 10
"""Attempts at least: this process may have been busy for all that time, and have read no answers."""

Listener = Callable[[str], None]
T = TypeVar("T")


async def when_less_busy(clock: IReactorTime, call: Callable[[], Awaitable[T]]) -> T:
    """Make a call again for a while if it was not made because too many wait for an answer: Redis does answer.

    :raises DependencyFailed: it failed for another reason, or there were too many calls all the time.
    """
    until, left = clock.seconds() + BUSY_LONGEST, BUSY_ATTEMPTS
    while True:
        try:
            return await call()
        except DependencyFailed as failed:
            left -= 1
            if failed.reason != QUEUE_FULL or (left <= 0 and clock.seconds() >= until):
                raise
        await deferLater(clock, BUSY_POLL)


@frozen
class Script:
    """A Lua script."""

    text: str
    sha: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


@define(eq=False)
class RedisClient:
    """Talks to one server over two connections: one for commands, one for what is published.

    :param on_server: called with every new connection before anybody uses it.
    :ivar on_subscribed: called with every new subscription: messages may have been lost before.
    :ivar epoch: names the server's data set; see `ServerInfo`.
    :ivar trouble: why the last write failed; "" if it succeeded.
    """

    _address: RedisAddress
    _reactor: Any = field(repr=False)
    _metrics: Metrics = field(repr=False)
    timeout: float = field(default=CALL_TIMEOUT, kw_only=True)
    epoch: str = field(init=False, default="")
    trouble: str = field(init=False, default="")
    on_server: list[Callable[[ServerInfo], None]] = field(init=False, factory=list)
    on_subscribed: list[Callable[[], None]] = field(init=False, factory=list)
    breaker: CircuitBreaker = field(init=False, factory=CircuitBreaker)
    _prober: Prober = field(init=False, repr=False)
    _commands: Link[CommandProtocol] = field(init=False, repr=False)
    _messages: Link[SubscriberProtocol] = field(init=False, repr=False)
    _listeners: dict[str, Listener] = field(init=False, factory=dict)
    _loads: SharedLookups[Script, None] = field(init=False, repr=False)
    _waiting: int = field(init=False, default=0)
    _seconds: Times = field(init=False, repr=False)
    _outcomes: dict[str, Counter] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._prober = Prober(self.breaker, self._reactor, self.probe)
        self._commands = Link(self._address, CommandProtocol, self._commands_ready, self._reactor, self.timeout)
        self._messages = Link(
            self._address, SubscriberProtocol, self._messages_ready, self._reactor, self.timeout, first=self._commands
        )
        self._loads = SharedLookups(self._load)
        self._seconds = self._metrics.dependency_seconds.labels(NAME)
        outcomes = ("ok", "refused", "failed", "circuit_open", "queue_full")
        self._outcomes = {outcome: self._metrics.dependency_calls.labels(NAME, outcome) for outcome in outcomes}
        self._metrics.circuit_open.labels(NAME).set(0)

    # -- life --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, and stay connected."""
        self._commands.start()
        self._messages.start()

    def stop(self) -> None:
        self._prober.stop()
        self._commands.stop()
        self._messages.stop()

    @property
    def available(self) -> bool:
        """Whether calls are made at all now."""
        return self._commands.protocol is not None and not self.breaker.open

    @property
    def fault(self) -> str:
        """Why calls fail now; "" if nothing is known to be wrong."""
        if self._commands.protocol is None:
            return self._commands.fault
        return (self.trouble or "circuit_open") if self.breaker.open else ""

    @property
    def message_fault(self) -> str:
        """Why messages of other guards do not arrive although calls succeed; "" if they do."""
        fault = "" if self._messages.protocol is not None else self._messages.fault
        return "" if fault in (NOT_CONNECTED, "connection_lost") else fault

    async def _commands_ready(self, protocol: CommandProtocol, server: ServerInfo) -> None:
        self.epoch = server.epoch
        if self.breaker.succeeded():
            self._metrics.circuit_open.labels(NAME).set(0)
        for told in self.on_server:
            told(server)

    async def _messages_ready(self, protocol: SubscriberProtocol, server: ServerInfo) -> None:
        protocol.on_message = self._message
        if self._listeners:
            await protocol.subscribe(list(self._listeners))
        for told in self.on_subscribed:
            told()

    # -- messages ----------------------------------------------------------------------------------------

    def listen(self, channel: str, listener: Listener) -> None:
        """Call ``listener`` with each message of a channel. It must be called before `start`. Messages may be lost."""
        self._listeners[channel] = listener

    def subscribe_again(self) -> None:
        """Make a new connection for messages: this one seems to lose them."""
        self._messages.drop()

    async def publish(self, channel: str, message: str) -> None:
        """Send a message to all guards, this one included. :raises DependencyFailed: it was not sent."""
        await self.call("PUBLISH", channel, message)

    def _message(self, channel: str, message: str) -> None:
        listener = self._listeners.get(channel)
        if listener is None:
            return
        try:
            listener(message)
        except Exception:
            log.failure("a message in {channel} could not be handled", channel=channel)

    # -- calls -------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """See whether the server accepts writes. :raises DependencyFailed: it does not."""
        try:
            await self._call(("SET", PROBE_KEY, "1", "EX", 60), is_probe=True)
        except DependencyFailed as failed:
            if failed.reason == "timeout":  # its machine may be gone: the connection would not end for many minutes
                self._commands.drop()
            raise
        self.trouble = ""

    async def run(self, script: Script, keys: Sequence[str], *arguments: str) -> Any:
        """Run a script on keys that belong together. :raises DependencyFailed: no usable answer in time."""
        try:
            return await self.run_loaded(script, keys, *arguments)
        except DependencyFailed as failed:
            if failed.reason != NO_SCRIPT:
                raise
        await self.load(script)
        return await self.run_loaded(script, keys, *arguments)

    async def run_loaded(self, script: Script, keys: Sequence[str], *arguments: str) -> Any:
        """The same in one round trip. :raises DependencyFailed: with `NO_SCRIPT` if the server does not know it."""
        answer = await self.call("EVALSHA", script.sha, len(keys), *keys, *arguments)
        self.trouble = ""
        return answer

    async def load(self, script: Script) -> None:
        """Let the server know a script. It forgets them when it restarts. Calls at the same time share one command."""
        await self._loads.get(script)

    async def _load(self, script: Script) -> None:
        await self.call("SCRIPT", "LOAD", script.text, limited=False)

    async def connected_again(self) -> None:
        """Wait a moment for a new connection. :raises DependencyFailed: there is none."""
        await self._commands.connected(RECONNECT_WAIT)

    async def call(self, *words: str | bytes | int, limited: bool = True) -> Any:
        """Send one command.

        :param limited: do not send it if `CALLS_AT_ONCE` wait already. Else there must be few of these calls.
        :raises DependencyFailed: no usable answer in time.
        """
        return await self._call(words, is_probe=False, limited=limited)

    async def _call(self, words: tuple[str | bytes | int, ...], *, is_probe: bool, limited: bool = True) -> Any:
        protocol = self._commands.protocol
        if protocol is None:
            raise DependencyFailed(NAME, self._commands.fault)
        if self.breaker.open and not is_probe:
            self._outcomes["circuit_open"].inc()
            raise CircuitOpen(NAME)
        if limited and self._waiting >= CALLS_AT_ONCE:
            self._outcomes[QUEUE_FULL].inc()
            raise DependencyFailed(NAME, QUEUE_FULL)
        began = self._reactor.seconds()
        self._waiting += 1
        try:
            answer = await protocol.execute_command(*words)
        except CancelledError:
            raise
        except Exception as error:
            reason = self._reason(error)
            if reason == NO_SCRIPT:
                raise DependencyFailed(NAME, reason) from None
            self._failed(reason)
            raise DependencyFailed(NAME, reason, error) from None
        finally:
            self._waiting -= 1
            self._seconds.observe(self._reactor.seconds() - began)
        self._succeeded()
        return answer

    def _reason(self, error: Exception) -> str:
        if isinstance(error, txredisapi.ResponseError):
            if str(error).startswith("NOSCRIPT"):
                return NO_SCRIPT
            reason = reason_of(error)
            if reason == "error":
                log.error("Redis answered {error}", error=str(error)[:300], event_name="redis_error")
            return reason
        if isinstance(error, txredisapi.ConnectionError) and not isinstance(error, txredisapi.TimeoutError):
            return "connection_lost"
        return reason_of(error)

    def _succeeded(self) -> None:
        self._outcomes["ok"].inc()
        if self.breaker.succeeded():
            self._metrics.circuit_open.labels(NAME).set(0)
            log.info("Redis answers again", event_name="dependency_up")

    def _failed(self, reason: str) -> None:
        self._outcomes["failed"].inc()
        if reason != self.trouble and reason in ADVICE:
            log.error(
                "Redis rejects what this guard writes: {reason}. {advice}", reason=reason, advice=ADVICE[reason],
                event_name="redis_rejects",
            )  # fmt: skip
        self.trouble = reason
        if reason == "read_only":  # the server has become a replica: find the master
            self._commands.drop()
        if self.breaker.failed():
            self._metrics.circuit_open.labels(NAME).set(1)
            log.error(
                "Redis failed five times in a row ({reason}); it is not called until a probe succeeds", reason=reason,
                event_name="dependency_down",
            )  # fmt: skip
            self._prober.start()
