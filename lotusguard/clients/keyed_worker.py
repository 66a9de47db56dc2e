# SPDX-License-Identifier: Apache-2.0
"""Background work by key: never twice at once for the same key, and again if asked for while it runs."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from attrs import define, field
from twisted.internet.defer import Deferred

from lotusguard.clients.lookups import fire_all
from lotusguard.clients.waiting import run_in_background

K = TypeVar("K", bound=Hashable)


@define(eq=False)
class KeyedWorker(Generic[K]):
    """Runs work for keys in the background::

        worker = KeyedWorker(enforce, limit=8, failed=log_failure)
        worker.run(alias)                    # at once
        worker.run(alias, urgent=False)      # when fewer than 8 keys are being worked on

    A key whose work is urgent and runs already is worked on once more afterwards; one that is not urgent is left alone.

    :param work: what is done for a key.
    :param limit: how many keys are worked on before those that are not urgent wait.
    :param failed: called with the key and the Failure of its work.
    """

    _work: Callable[[K], Coroutine[Any, Any, object]]
    _limit: int
    _failed: Callable[[K, Any], None]
    _running: dict[K, Deferred[Any] | None] = field(factory=dict, init=False)
    _again: set[K] = field(factory=set, init=False)
    _queued: OrderedDict[K, None] = field(factory=OrderedDict, init=False)  # a plain dict finds its first key slowly
    _waiters: list[Deferred[None]] = field(factory=list, init=False)
    _stopped: bool = field(default=False, init=False)
    _ending: deque[K] = field(factory=deque, init=False)
    _starting_next: bool = field(default=False, init=False)

    def run(self, key: K, *, urgent: bool = True, again: bool = False) -> None:
        """Ask for the key's work. Returns at once.

        :param urgent: start it now, whatever the limit; else when few other keys are being worked on.
        :param again: if it runs already, work on the key once more afterwards, also if that is not urgent.
        """
        if self._stopped:
            return
        if key in self._running:
            if urgent or again:
                self._again.add(key)
        elif urgent or len(self._running) < self._limit:
            self._start(key)
        else:
            self._queued[key] = None

    def idle(self) -> Deferred[None]:
        """Fires when nothing runs and nothing waits."""
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        self._tell_if_idle()
        return waiter

    def stop(self) -> None:
        """Cancel everything, and start nothing more."""
        self._stopped = True
        self._queued.clear()
        self._again.clear()
        for work in list(self._running.values()):
            if work is not None:
                work.cancel()

    def _start(self, key: K) -> None:
        self._queued.pop(key, None)
        self._again.discard(key)
        self._running[key] = None  # the work may end before run_in_background returns
        running = run_in_background(self._work(key), lambda failure: self._failed(key, failure))
        if not running.called:
            self._running[key] = running
        running.addBoth(lambda _: self._ended(key))

    def _ended(self, key: K) -> None:
        """Start what comes next. Work may end at once, so a loop does it: nested calls would exceed Python's limit."""
        self._ending.append(key)
        if self._starting_next:
            return
        self._starting_next = True
        try:
            while self._ending:
                self._start_after(self._ending.popleft())
        finally:
            self._starting_next = False
        self._tell_if_idle()

    def _start_after(self, key: K) -> None:
        del self._running[key]
        if key in self._again:
            self._start(key)
        elif self._queued and len(self._running) < self._limit:
            self._start(next(iter(self._queued)))

    def _tell_if_idle(self) -> None:
        if not self._running and not self._queued:
            waiters, self._waiters = self._waiters, []
            fire_all(waiters, None)
