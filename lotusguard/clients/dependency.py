# SPDX-License-Identifier: Apache-2.0
"""A service we ask things of: when it is not waited for, and what its failures are called. Floor: clients."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container
from contextlib import suppress
from random import random
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent

from lotusguard.clients.circuit_breaker import PROBE_INTERVAL, CircuitBreaker
from lotusguard.clients.http import Answer, BodyTooLarge, BytesBody, collected
from lotusguard.metrics import Metrics

log = Logger()
T = TypeVar("T")

CALLS_AT_ONCE = 32
"""Calls to one dependency that are under way at once; the others queue. More new connections than a listener's backlog
(50 in Synapse) would be answered by the kernel a second later."""


_SHORT_OF_BREATH = (408, 429)
"""Statuses of a dependency that cannot keep up."""


class DependencyFailed(Exception):
    """A dependency gave no usable answer. ``reason`` is one of a few words, fit for a metric's label."""

    def __init__(self, dependency: str, reason: str) -> None:
        super().__init__(f"{dependency}: {reason}")
        self.dependency = dependency
        self.reason = reason


class CircuitOpen(DependencyFailed):
    """The dependency failed so often that it is not asked until it is well again."""

    def __init__(self, dependency: str) -> None:
        super().__init__(dependency, "circuit_open")


class DependencyRefused(DependencyFailed):
    """The dependency is well and said no: to our credentials, or to what was asked."""


class Dependency:
    """A service we ask things of, with its deadline and its circuit breaker.

    While the breaker is open calls fail at once with `CircuitOpen`, and a ``probe`` is sent every two seconds (a
    little more, by chance, so that several guards do not knock gather) until it succeeds: nobody's join waits for it.

    :param name: for logs and metrics.
    :param agent: takes request targets, and calls the configured address only (`FixedAgent`).
    :param timeout: seconds for one whole call, the body included.
    :param limit: bytes an answer may have.
    """

    def __init__(
        self,
        name: str,
        agent: IAgent,
        clock: IReactorTime,
        metrics: Metrics,
        *,
        timeout: float,
        limit: int = 16 * 1024 * 1024,
    ) -> None:
        self.name = name
        self.breaker = CircuitBreaker()
        self.probe: Callable[[], Awaitable[object]] | None = None
        self._agent = agent
        self._clock = clock
        self._metrics = metrics
        self._timeout = timeout
        self._limit = limit
        self._turns = DeferredSemaphore(CALLS_AT_ONCE)
        self._probing: Any = None
        self._seconds = metrics.dependency_seconds.labels(name)
        self._outcomes = {
            outcome: metrics.dependency_calls.labels(name, outcome)
            for outcome in ("ok", "refused", "failed", "circuit_open")
        }
        metrics.circuit_open.labels(name).set(0)

    async def call(
        self,
        method: bytes,
        path: bytes,
        headers: Headers,
        body: bytes | None = None,
        *,
        read: Callable[[Answer], T],
        answers: Container[int] = (),
        wait: bool = True,
    ) -> T:
        """Make one call and read its answer.

        :param read: turns the answer into what was asked for; whatever it raises means that the answer was invalid.
        :param answers: statuses that are for ``read`` although they look like a refusal or a failure.
        :param wait: ``False`` for a probe: made even while nobody waits for this dependency.
        :raises CircuitOpen: the breaker is open.
        :raises DependencyRefused: 401 or 403, or another 4xx that ``read`` can make nothing of.
        :raises DependencyFailed: no usable answer in time.
        """
        if wait and self.breaker.open:
            raise self._not_waited_for()
        began = self._clock.seconds()
        try:
            answer = await self._answer(method, path, headers, body, wait)
            if answer.code not in answers:
                if answer.code in (401, 403):
                    self._well("refused")
                    raise DependencyRefused(self.name, f"status_{answer.code}")
                if answer.code >= 500 or 300 <= answer.code < 400:
                    raise DependencyFailed(self.name, f"status_{answer.code}")
            try:
                result = read(answer)
            except Exception:
                if 400 <= answer.code < 500 and answer.code not in _SHORT_OF_BREATH:
                    # It is well and does not like the question, which a caller may have had a hand in: no reason to
                    # stop asking it other questions.
                    self._well("refused")
                    raise DependencyRefused(self.name, f"status_{answer.code}") from None
                reason = "invalid_response" if answer.code < 400 else f"status_{answer.code}"
                raise DependencyFailed(self.name, reason) from None
        except (DependencyRefused, CircuitOpen):
            raise
        except DependencyFailed as failed:
            self._ill(failed.reason)
            raise
        finally:
            self._seconds.observe(self._clock.seconds() - began)
        self._well("ok")
        return result

    async def _answer(self, method: bytes, path: bytes, headers: Headers, body: bytes | None, wait: bool) -> Answer:
        await self._turns.acquire()
        try:
            if wait and self.breaker.open:  # it fell ill while we queued
                raise self._not_waited_for()
            exchange = Deferred.fromCoroutine(self._exchange(method, path, headers, body))
            return await exchange.addTimeout(self._timeout, self._clock)
        except (CancelledError, CircuitOpen):
            raise
        except Exception as error:
            raise DependencyFailed(self.name, _reason(error)) from None
        finally:
            self._turns.release()

    async def _exchange(self, method: bytes, path: bytes, headers: Headers, body: bytes | None) -> Answer:
        producer = None if body is None else BytesBody(body)
        response = await self._agent.request(method, path, headers, producer)
        return Answer(response.code, response.headers, await collected(response, self._limit))

    def _not_waited_for(self) -> CircuitOpen:
        self._outcomes["circuit_open"].inc()
        return CircuitOpen(self.name)

    def _well(self, outcome: str) -> None:
        self._outcomes[outcome].inc()
        if self.breaker.succeeded():
            self._metrics.circuit_open.labels(self.name).set(0)
            log.info("{dependency} answers again", dependency=self.name, event_name="dependency_up")

    def _ill(self, reason: str) -> None:
        self._outcomes["failed"].inc()
        if self.breaker.failed():
            self._metrics.circuit_open.labels(self.name).set(1)
            log.error(
                "{dependency} is not waited for until it answers again: {reason}",
                dependency=self.name,
                reason=reason,
                event_name="dependency_down",
            )
            self._probe_later()

    def _probe_later(self) -> None:
        if self.probe is not None and self._probing is None:
            self._probing = self._clock.callLater(PROBE_INTERVAL * (1 + random() / 4), self._probe_now)

    def _probe_now(self) -> None:
        self._probing = None
        if self.probe is None or not self.breaker.open:  # it was a call that found it well again
            return
        probing = self._probing = Deferred.fromCoroutine(_tried(self.probe))
        probing.addErrback(_unexpected)
        probing.addBoth(lambda _: self._probed())  # may be at once, so after it was noted

    def _probed(self) -> None:
        self._probing = None
        if self.breaker.open:
            self._probe_later()

    def stop(self) -> None:
        """No more probes."""
        self.probe = None
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None


async def _tried(probe: Callable[[], Awaitable[object]]) -> None:
    with suppress(DependencyFailed):
        await probe()


def _unexpected(failure: Failure) -> None:
    if not failure.check(CancelledError):
        log.failure("a probe failed in an unexpected way", failure)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, BodyTooLarge):
        return "too_large"
    if isinstance(error, ResponseFailed | PotentialDataLoss):
        return "truncated"
    return "unreachable"
