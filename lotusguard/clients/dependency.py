# SPDX-License-Identifier: Apache-2.0
"""Calls to one dependency: deadline, fair turns, circuit breaker, and names for what fails."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Container
from typing import TypeVar

from attrs import define, field
from prometheus_client import Counter
from twisted.internet.defer import CancelledError, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.client import ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers

from lotusguard.clients.circuit_breaker import CircuitBreaker, Prober
from lotusguard.clients.clock_skew import clock_skew
from lotusguard.clients.credentials import FORBIDDEN, UNAUTHORIZED, Credentials
from lotusguard.clients.failures import CircuitOpen, DependencyFailed, DependencyRefused, TooManyCalls
from lotusguard.clients.http import Agent, Answer, BodyTooLarge, fetch
from lotusguard.clients.turns import FairSemaphore, QueueFull
from lotusguard.metrics import Metrics
from lotusguard.times import Times

__all__ = ["CircuitOpen", "Dependency", "DependencyFailed", "DependencyRefused", "TooManyCalls"]

log = Logger()
T = TypeVar("T")

CALLS_AT_ONCE = 32
"""Calls to one dependency that are in flight at once. More new connections than a listener's backlog (50 in Synapse)
would be accepted by the kernel only a second later."""
CALLS_QUEUED = 2048
"""Calls that may wait for a turn."""
QUEUE_TIMEOUT = 10.0
"""Seconds a call may wait for a turn. A join has its own, shorter deadline."""
LARGEST_ANSWER = 16 * 1024 * 1024
SLOW = 0.5
"""Part of the timeout after which a call that its caller gives up counts as failed. Otherwise a dependency that is
always later than its callers' deadlines would never open its circuit."""
_OVERLOADED = (408, 429)
"""Statuses of a dependency that cannot keep up."""


@define(eq=False)
class Dependency:
    """A service we call, with its deadline and its circuit breaker.

    While the circuit is open, calls fail at once with `CircuitOpen`, and ``probe`` is called every two seconds until it
    succeeds.

    :param name: for logs and metrics.
    :param agent: takes request targets and calls the configured address only (`FixedAgent`).
    :param timeout: seconds for one call, its body included, from the beginning of its turn.
    :param at_once: calls in flight at once.
    :param limit: bytes an answer may have.
    :param wall_clock: our time in seconds since the epoch, compared with the ``Date`` of answers.
    :ivar skew: seconds by which the dependency's clock is ahead of ours; None while unknown.
    """

    name: str
    _agent: Agent
    _clock: IReactorTime
    _metrics: Metrics
    timeout: float = field(kw_only=True)
    _at_once: int = field(default=CALLS_AT_ONCE, kw_only=True)
    _limit: int = field(default=LARGEST_ANSWER, kw_only=True)
    _wall_clock: Callable[[], float] = field(default=time.time, kw_only=True)
    breaker: CircuitBreaker = field(init=False, factory=CircuitBreaker)
    skew: float | None = field(init=False, default=None)
    _turns: FairSemaphore = field(init=False)
    _credentials: Credentials = field(init=False)
    _prober: Prober = field(init=False)
    _seconds: Times = field(init=False)
    _outcomes: dict[str, Counter] = field(init=False)
    _last_date: bytes = field(init=False, default=b"")

    def __attrs_post_init__(self) -> None:
        self._turns = FairSemaphore(self._at_once, CALLS_QUEUED)
        self._credentials = Credentials(self.name, self._metrics.credentials_refused.labels(self.name))
        self._prober = Prober(self.breaker, self._clock)
        self._seconds = self._metrics.dependency_seconds.labels(self.name)
        outcomes = ("ok", "refused", "failed", "circuit_open", "queue_full")
        self._outcomes = {outcome: self._metrics.dependency_calls.labels(self.name, outcome) for outcome in outcomes}
        self._metrics.circuit_open.labels(self.name).set(0)

    @property
    def probe(self) -> Callable[[], Awaitable[object]] | None:
        """One call (with ``is_probe=True``) that shows whether the dependency works and accepts our credentials."""
        return self._prober.probe

    @probe.setter
    def probe(self, probe: Callable[[], Awaitable[object]]) -> None:
        self._prober.probe = probe

    @property
    def clock(self) -> IReactorTime:
        """The clock of its deadlines."""
        return self._clock

    def now(self) -> float:
        """Seconds on the clock of its deadlines."""
        return self._clock.seconds()

    @property
    def refused(self) -> str | None:
        """``status_401`` or ``status_403`` if our credentials were refused and not accepted since."""
        return self._credentials.refused

    async def call(
        self,
        method: bytes,
        path: bytes,
        headers: Headers,
        body: bytes | None = None,
        *,
        read: Callable[[Answer], T],
        expected: Container[int] = (),
        turn: str = "",
        is_probe: bool = False,
    ) -> T:
        """Make one call and read its answer.

        :param read: turns the answer into the result; any exception from it means that the answer is invalid.
        :param expected: statuses that ``read`` handles although they look like a refusal or a failure.
        :param turn: the room or user for whom we call; waiting calls take turns between these.
        :param is_probe: the call is made even while the circuit is open.
        :raises CircuitOpen: the circuit is open.
        :raises TooManyCalls: too many calls wait for a turn.
        :raises DependencyRefused: 401 or 403, or another 4xx that ``read`` does not understand.
        :raises DependencyFailed: no usable answer in time.
        """
        self._check_circuit(is_probe)
        began = self._clock.seconds()
        try:
            answer = await self._in_turn(method, path, headers, body, turn, is_probe)
            if answer.code not in expected:
                if answer.code in (UNAUTHORIZED, FORBIDDEN):
                    self._credentials.refuse(answer.code, path)
                    self._succeeded("refused")
                    raise DependencyRefused(self.name, f"status_{answer.code}")
                if answer.code >= 500 or 300 <= answer.code < 400:
                    raise DependencyFailed(self.name, f"status_{answer.code}")
            result = self._read(answer, read)
        except (DependencyRefused, CircuitOpen, TooManyCalls):
            raise
        except DependencyFailed as failed:
            self._failed(failed.reason)
            raise
        finally:
            self._seconds.observe(self._clock.seconds() - began)
        if answer.code >= 500:  # it was expected, and tells neither that the dependency works nor that it does not
            self._outcomes["ok"].inc()
            return result
        self._succeeded("ok")
        self._credentials.accept(path, headers)
        return result

    def _read(self, answer: Answer, read: Callable[[Answer], T]) -> T:
        try:
            return read(answer)
        except Exception:
            if 400 <= answer.code < 500 and answer.code not in _OVERLOADED:
                # The dependency works and rejects this one request, which a client may have influenced. Other requests
                # must not suffer.
                self._succeeded("refused")
                raise DependencyRefused(self.name, f"status_{answer.code}") from None
            reason = "invalid_response" if answer.code < 400 else f"status_{answer.code}"
            raise DependencyFailed(self.name, reason) from None

    async def _in_turn(
        self, method: bytes, path: bytes, headers: Headers, body: bytes | None, turn: str, is_probe: bool
    ) -> Answer:
        try:
            if not self._turns.take():
                await self._turns.acquire(turn).addTimeout(QUEUE_TIMEOUT, self._clock)
        except (QueueFull, TimeoutError):
            self._outcomes["queue_full"].inc()
            raise TooManyCalls(self.name) from None
        began = self._clock.seconds()
        try:
            self._check_circuit(is_probe)  # it may have opened while this call waited for its turn
            asked_at = self._wall_clock()
            exchange = fetch(self._agent, method, path, headers, body, limit=self._limit)
            answer = await exchange.addTimeout(self.timeout, self._clock)
            self._compare_clocks(answer, asked_at)
            return answer
        except CircuitOpen:
            raise
        except CancelledError:
            if self._clock.seconds() - began >= SLOW * self.timeout:
                self._failed("timeout")
            raise
        except Exception as error:
            raise DependencyFailed(self.name, _reason(error), error) from None
        finally:
            self._turns.release()

    def _compare_clocks(self, answer: Answer, asked_at: float) -> None:
        """Read the ``Date`` header, if it is not the last one again: it changes once a second."""
        date = answer.header(b"date")
        if date == self._last_date:
            return
        self._last_date = date
        skew = clock_skew(date, asked_at, self._wall_clock())
        if skew is not None:
            self.skew = skew
            self._metrics.clock_skew.labels(self.name).set(skew)

    def _check_circuit(self, is_probe: bool) -> None:
        if self.breaker.open and not is_probe:
            self._outcomes["circuit_open"].inc()
            raise CircuitOpen(self.name)

    def _succeeded(self, outcome: str) -> None:
        self._outcomes[outcome].inc()
        if self.breaker.succeeded():
            self._metrics.circuit_open.labels(self.name).set(0)
            log.info("{dependency} answers again", dependency=self.name, event_name="dependency_up")

    def _failed(self, reason: str) -> None:
        self._outcomes["failed"].inc()
        if self.breaker.failed():
            self._metrics.circuit_open.labels(self.name).set(1)
            log.error(
                "{dependency} failed five times in a row ({reason}); it is not called until a probe succeeds",
                dependency=self.name,
                reason=reason,
                event_name="dependency_down",
            )
            self._prober.start()

    def stop(self) -> None:
        """Stop probing."""
        self._prober.stop()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, BodyTooLarge):
        return "too_large"
    if isinstance(error, ResponseFailed | PotentialDataLoss):
        return "truncated"
    return "unreachable"
