# SPDX-License-Identifier: Apache-2.0
"""Asking Redis for the generation of its data set: once for all commands of one turn of the reactor."""

from __future__ import annotations

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient
from lotusguard.clients.redis.faults import NAME, reason_of
from lotusguard.clients.waiting import fire_all
from lotusguard.guard.seats.redis.scripts import PREFIX

RECORD = f"{PREFIX}{{guards}}:epoch"
"""Key: what is known of the data set."""


@define(eq=False)
class Question:
    """Which generation Redis has, after it has carried out what was sent in the same turn as this was asked."""

    _redis: RedisClient
    _generation: str | None = field(init=False, default=None)
    _failed: str = field(init=False, default="")
    _answered: bool = field(init=False, default=False)
    _waiting: list[Deferred[None]] = field(init=False, factory=list)

    async def answer(self) -> str | None:
        """The generation; ``None`` if Redis has none. :raises DependencyFailed: Redis gives no usable answer."""
        if not self._answered:
            waiter: Deferred[None] = Deferred()
            self._waiting.append(waiter)
            await waiter
        if self._failed:
            raise DependencyFailed(NAME, self._failed)
        return self._generation

    async def send(self) -> None:
        """Ask Redis. It never fails: whoever waits for the answer is told."""
        try:
            # without an answer all steps of this turn would be made again
            self._generation = await self._redis.call("HGET", RECORD, "generation", limited=False)
        except Exception as error:
            self._failed = reason_of(error)
        self._answered = True
        fire_all(self._waiting, None)


@define(eq=False)
class Generation:
    """Joins of one turn ask one question. It is sent after their scripts, and together with them."""

    _redis: RedisClient
    _clock: IReactorTime
    _next: Question | None = field(init=False, default=None)

    def ask(self) -> Question:
        if self._next is None:
            self._next = Question(self._redis)
            self._clock.callLater(0, self._send)
        return self._next

    def _send(self) -> None:
        question, self._next = self._next, None
        if question is not None:
            Deferred.fromCoroutine(question.send())
