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

from lotusguard.clients.http import Answer, BodyTooLarge, BytesBody, collected
from lotusguard.metrics import Metrics
from lotusguard.rules.breaker import PROBE_INTERVAL, Breaker

log = Logger()
T = TypeVar("T")

CALLS_AT_ONCE = 32
"""Calls to one neighbour that are under way at once; the others queue. More new connections than a listener's backlog
(50 in Synapse) would be answered by the kernel a second later."""


_SHORT_OF_BREATH = (408, 429)
"""Statuses of a neighbour that cannot keep up."""


class NeighbourFailed(Exception):
    """A neighbour gave no usable answer. ``reason`` is one of a few words, fit for a metric's label."""

    def __init__(self, neighbour: str, reason: str) -> None:
        super().__init__(f"{neighbour}: {reason}")
        self.neighbour = neighbour
        self.reason = reason


class NotWaitedFor(NeighbourFailed):
    """The neighbour failed so often that it is not asked until it is well again."""

    def __init__(self, neighbour: str) -> None:
        super().__init__(neighbour, "not_waited_for")


class NeighbourRefused(NeighbourFailed):
    """The neighbour is well and said no: to our credentials, or to what was asked."""


class Neighbour:
    """A service we ask things of, with its deadline and its circuit breaker.

    While the breaker is open calls fail at once with `NotWaitedFor`, and a ``probe`` is sent every two seconds (a
    little more, by chance, so that several guards do not knock together) until it succeeds: nobody's join waits for it.

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
        self.breaker = Breaker()
        self.probe: Callable[[], Awaitable[object]] | None = None
        self._agent = agent
        self._clock = clock
        self._metrics = metrics
        self._timeout = timeout
        self._limit = limit
        self._turns = DeferredSemaphore(CALLS_AT_ONCE)
        self._probing: Any = None
        self._seconds = metrics.neighbour_seconds.labels(name)
        self._outcomes = {
            outcome: metrics.neighbour_calls.labels(name, outcome)
            for outcome in ("ok", "refused", "failed", "not_waited_for")
        }
        metrics.breaker_open.labels(name).set(0)

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

        :param read: turns the answer into what was asked for; whatever it raises means that the answer was garbage.
        :param answers: statuses that are for ``read`` although they look like a refusal or a failure.
        :param wait: ``False`` for a probe: made even while nobody waits for this neighbour.
        :raises NotWaitedFor: the breaker is open.
        :raises NeighbourRefused: 401 or 403, or another 4xx that ``read`` can make nothing of.
        :raises NeighbourFailed: no usable answer in time.
        """
        if wait and self.breaker.open:
            raise self._not_waited_for()
        began = self._clock.seconds()
        try:
            answer = await self._answer(method, path, headers, body, wait)
            if answer.code not in answers:
                if answer.code in (401, 403):
                    self._well("refused")
                    raise NeighbourRefused(self.name, f"status_{answer.code}")
                if answer.code >= 500 or 300 <= answer.code < 400:
                    raise NeighbourFailed(self.name, f"status_{answer.code}")
            try:
                result = read(answer)
            except Exception:
                if 400 <= answer.code < 500 and answer.code not in _SHORT_OF_BREATH:
                    # It is well and does not like the question, which a caller may have had a hand in: no reason to
                    # stop asking it other questions.
                    self._well("refused")
                    raise NeighbourRefused(self.name, f"status_{answer.code}") from None
                reason = "garbage" if answer.code < 400 else f"status_{answer.code}"
                raise NeighbourFailed(self.name, reason) from None
        except (NeighbourRefused, NotWaitedFor):
            raise
        except NeighbourFailed as failed:
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
        except (CancelledError, NotWaitedFor):
            raise
        except Exception as error:
            raise NeighbourFailed(self.name, _reason(error)) from None
        finally:
            self._turns.release()

    async def _exchange(self, method: bytes, path: bytes, headers: Headers, body: bytes | None) -> Answer:
        producer = None if body is None else BytesBody(body)
        response = await self._agent.request(method, path, headers, producer)
        return Answer(response.code, response.headers, await collected(response, self._limit))

    def _not_waited_for(self) -> NotWaitedFor:
        self._outcomes["not_waited_for"].inc()
        return NotWaitedFor(self.name)

    def _well(self, outcome: str) -> None:
        self._outcomes[outcome].inc()
        if self.breaker.succeeded():
            self._metrics.breaker_open.labels(self.name).set(0)
            log.info("{neighbour} answers again", neighbour=self.name, event_name="neighbour_well")

    def _ill(self, reason: str) -> None:
        self._outcomes["failed"].inc()
        if self.breaker.failed():
            self._metrics.breaker_open.labels(self.name).set(1)
            log.error(
                "{neighbour} is not waited for until it answers again: {reason}",
                neighbour=self.name,
                reason=reason,
                event_name="neighbour_ill",
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
    with suppress(NeighbourFailed):
        await probe()


def _unexpected(failure: Failure) -> None:
    if not failure.check(CancelledError):
        log.failure("a probe failed in an unexpected way", failure)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, BodyTooLarge):
        return "endless"
    if isinstance(error, ResponseFailed | PotentialDataLoss):
        return "truncated"
    return "unreachable"
