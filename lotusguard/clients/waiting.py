# SPDX-License-Identifier: Apache-2.0
"""Waiting gather, and waiting only so long. Floor: clients."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Generic, TypeVar

from twisted.internet.defer import CancelledError, Deferred, FirstError, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def tell(waiters: Iterable[Deferred[T]], outcome: Any) -> None:
    """Tell all who have not given up. A Failure makes what they wait for fail."""
    for waiter in waiters:
        if not waiter.called:
            waiter.callback(outcome)


class SharedLookups(Generic[K, T]):
    """One call for all who wait for the same thing::

        looks = SharedLookups(look_at_room)
        await looks.get(room_id)        # two of these at once: one look_at_room(room_id)

    A waiter that gives up leaves the call to the others. `forget` lets the next one start a new call, although the
    old one still runs: what it brings may be older than what made us forget.
    """

    def __init__(self, call: Callable[[K], Coroutine[Any, Any, T]]) -> None:
        self._call = call
        self._waiting: dict[K, list[Deferred[T]]] = {}

    def get(self, key: K) -> Deferred[T]:
        """The outcome of the call for this key, the running one or a new one."""
        waiters = self._waiting.get(key)
        mine: Deferred[T] = Deferred()
        if waiters is not None:
            waiters.append(mine)
            return mine
        waiters = self._waiting[key] = [mine]
        call = Deferred.fromCoroutine(self._call(key))

        def finished(outcome: Any) -> None:
            if self._waiting.get(key) is waiters:
                del self._waiting[key]
            tell(waiters, outcome)

        call.addBoth(finished)
        return mine

    def forget(self, key: K) -> None:
        """Whoever asks from now on gets a new call."""
        self._waiting.pop(key, None)

    def __contains__(self, key: K) -> bool:
        return key in self._waiting


class Budget:
    """How long one join waits for dependencies, all in all::

    budget = Budget(clock, 1.5)
    policy = await budget.wait(policies.get(room_id))     # TimeoutError when there is nothing left
    present = await budget.wait(roster.refresh(room_id))  # only what the first left over
    """

    def __init__(self, clock: IReactorTime, seconds: float) -> None:
        self._clock = clock
        self._left = seconds

    def wait(self, outcome: Deferred[T]) -> Deferred[T]:
        """The same outcome, or `TimeoutError` when the budget is used up before. Only time spent in here counts.

        Takes the Deferred over: it is cancelled then, so hand in one of your own (`SharedLookups` gives one each).
        """
        if outcome.called and not outcome.paused:
            return outcome
        began = self._clock.seconds()

        def spent(result: T) -> T:
            self._left -= self._clock.seconds() - began
            return result

        return outcome.addTimeout(max(0.0, self._left), self._clock).addBoth(spent)


async def gather(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Ask several things at once. The first that fails makes all fail, with its own exception."""
    calls = [Deferred.fromCoroutine(call) for call in asked]
    try:
        return list(await gatherResults(calls, consumeErrors=True))
    except FirstError as first:
        for call in calls:
            call.cancel()
        first.subFailure.raiseException()
        raise


def run_in_background(work: Coroutine[Any, Any, object], failed: Callable[[Failure], None]) -> Deferred[Any]:
    """Start something nobody waits for. :param failed: takes the Failure, if it was not just cancelled."""
    begun: Deferred[Any] = Deferred.fromCoroutine(work)

    def ended(failure: Failure) -> None:
        if not failure.check(CancelledError):
            failed(failure)

    return begun.addErrback(ended)
