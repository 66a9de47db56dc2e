# SPDX-License-Identifier: Apache-2.0
"""Small asynchronous tools: deadlines, several calls at once, work in the background."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from attrs import frozen
from twisted.internet.defer import CancelledError, Deferred, FirstError, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from lotusguard.clients.lookups import Fetched, FreshLookups, SharedLookups, fire_all
from lotusguard.clients.turns import FairSemaphore, QueueFull

__all__ = [
    "Deadline",
    "FairSemaphore",
    "Fetched",
    "FreshLookups",
    "QueueFull",
    "SharedLookups",
    "fire_all",
    "gather",
    "gather_in_turns",
    "in_slices",
    "run_in_background",
]

SLICE = 250
"""Items after which other work gets its turn. One takes some ten microseconds."""
T = TypeVar("T")
S = TypeVar("S")


@frozen
class Deadline:
    """A point in time by which something must be done::

        deadline = Deadline.after(clock, 1.5)
        policy = await deadline.wait(policies.get(room_id))                  # TimeoutError at the deadline
        roster = await deadline.sooner(0.5).wait(roster.refresh(room_id))    # half a second at most

    :ivar at: seconds on ``clock``.
    """

    clock: IReactorTime
    at: float

    @classmethod
    def after(cls, clock: IReactorTime, seconds: float) -> Deadline:
        """A deadline so many seconds from now."""
        return cls(clock, clock.seconds() + seconds)

    def left(self) -> float:
        """Seconds until the deadline; 0 once it has passed."""
        return max(0.0, self.at - self.clock.seconds())

    @property
    def passed(self) -> bool:
        return self.clock.seconds() >= self.at

    def sooner(self, seconds: float) -> Deadline:
        """A deadline for a part of the work: so many seconds from now, and never later than this one."""
        return Deadline(self.clock, min(self.at, self.clock.seconds() + seconds))

    def wait(self, outcome: Deferred[T]) -> Deferred[T]:
        """The same outcome, or `TimeoutError` at the deadline.

        Takes the Deferred over and cancels it at the deadline, so pass one that nobody else waits for (`SharedLookups`
        returns a separate one to each caller).
        """
        if outcome.called and not outcome.paused:
            return outcome
        return outcome.addTimeout(self.left(), self.clock)


async def gather(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run several coroutines at once. The first failure cancels the others and is raised as it is."""
    running = [Deferred.fromCoroutine(call) for call in calls]
    try:
        return list(await gatherResults(running, consumeErrors=True))
    except FirstError as first:
        for call in running:
            call.cancel()
        first.subFailure.raiseException()
        raise


async def gather_in_turns(limit: int, call: Callable[[S], Coroutine[Any, Any, T]], items: Iterable[S]) -> list[T]:
    """Call a coroutine function for every item, at most so many at once. The first failure cancels the others.

    :return: the results, in no particular order.
    """
    results: list[T] = []
    waiting = iter(items)

    async def work() -> None:
        for item in waiting:  # a loop, because calls that end at once would nest too deeply in a semaphore
            results.append(await call(item))

    await gather(work() for _ in range(limit))
    return results


async def in_slices(clock: IReactorTime, items: Iterable[S]) -> AsyncIterator[S]:
    """The items, with a pause after every `SLICE`: a call with thousands of participants must not delay joins::

    async for participant in in_slices(clock, participants):
        ...
    """
    for number, item in enumerate(items, 1):
        yield item
        if number % SLICE == 0:
            await deferLater(clock, 0)


def run_in_background(work: Coroutine[Any, Any, object], failed: Callable[[Failure], None]) -> Deferred[Any]:
    """Start work that nobody awaits. :param failed: called with the Failure, unless the work was cancelled."""
    running: Deferred[Any] = Deferred.fromCoroutine(work)

    def ended(failure: Failure) -> None:
        if not failure.check(CancelledError):
            failed(failure)

    return running.addErrback(ended)
