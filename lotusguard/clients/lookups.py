# SPDX-License-Identifier: Apache-2.0
"""Lookups that several callers share: one call in flight for each key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Generic, TypeVar

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def fire_all(waiters: Iterable[Deferred[T]], outcome: Any) -> None:
    """Fire every Deferred that has not fired yet. :param outcome: a result, or a Failure."""
    for waiter in waiters:
        if not waiter.called:
            waiter.callback(outcome)


@define(eq=False)
class _Call(Generic[T]):
    """One call, running or still to be started, and the callers who wait for it.

    :ivar abandoned: called when the last caller has given up.
    """

    abandoned: Callable[[_Call[T]], None]
    began: float = 0.0
    waiters: dict[Deferred[T], None] = field(factory=dict)
    running: Deferred[Any] | None = None

    def join(self) -> Deferred[T]:
        """A Deferred for one more caller. Cancelling it gives up."""
        waiter: Deferred[T] = Deferred(self._gave_up)
        self.waiters[waiter] = None
        return waiter

    def _gave_up(self, waiter: Deferred[T]) -> None:
        self.waiters.pop(waiter, None)
        if not self.waiters:
            self.abandoned(self)

    def start(self, work: Coroutine[Any, Any, Any], ended: Callable[[Any], None]) -> None:
        """:param ended: called with the result or the Failure."""
        self.running = Deferred.fromCoroutine(work)
        self.running.addBoth(ended)

    def cancel(self) -> None:
        if self.running is not None:
            self.running.cancel()


@define(eq=False)
class SharedLookups(Generic[K, T]):
    """One call for all callers who want the same thing at the same time::

        lookups = SharedLookups(look_up_room)
        await lookups.get(room_id)        # two of these at once make one call of look_up_room(room_id)

    The call is cancelled when nobody waits for it any more. `forget` makes the next caller start a new call although
    the old one still runs: its result may be older than the change that made us forget.
    """

    _call: Callable[[K], Coroutine[Any, Any, T]]
    _calls: dict[K, _Call[T]] = field(factory=dict, init=False)

    def get(self, key: K) -> Deferred[T]:
        """The outcome of the call for this key: of the running one, or of a new one."""
        running = self._calls.get(key)
        if running is not None:
            return running.join()

        def abandoned(call: _Call[T]) -> None:
            self._remove(key, call)
            call.cancel()

        call = self._calls[key] = _Call(abandoned)
        mine = call.join()

        def ended(outcome: Any) -> None:
            self._remove(key, call)
            fire_all(list(call.waiters), outcome)

        call.start(self._call(key), ended)
        return mine

    def forget(self, key: K) -> None:
        """The next caller gets a new call."""
        self._calls.pop(key, None)

    def _remove(self, key: K, call: _Call[T]) -> None:
        if self._calls.get(key) is call:
            del self._calls[key]

    def __contains__(self, key: K) -> bool:
        return key in self._calls


@frozen
class Fetched(Generic[T]):
    """:ivar began: when the call began that returned the value; the value may be as old as that."""

    value: T
    began: float


@define(eq=False)
class _Key(Generic[T]):
    """The calls for one key.

    :ivar running: the call in flight.
    :ivar following: the call for those who came after the running one began.
    :ivar timer: starts the following call, while only the spacing delays it.
    """

    running: _Call[Fetched[T]] | None = None
    following: _Call[Fetched[T]] | None = None
    timer: IDelayedCall | None = None

    @property
    def idle(self) -> bool:
        return self.running is None and self.following is None


@define(eq=False)
class FreshLookups(Generic[K, T]):
    """Shared lookups for callers who say how old a result may be::

        members = FreshLookups(fetch_members, clock, spacing=0.1)
        fetched = await members.get(room_id, since=arrived)     # fetched.began >= arrived

    At most one call for each key is in flight. Callers for whom the running call began too early share the one that
    follows it. The call is cancelled when nobody waits for it any more. Results are not kept.

    :param spacing: seconds between the beginnings of two calls for the same key, at least.
    """

    _call: Callable[[K], Coroutine[Any, Any, T]]
    _clock: IReactorTime
    _spacing: float = field(default=0.0, kw_only=True)
    _keys: dict[K, _Key[T]] = field(factory=dict, init=False)
    _starts: OrderedDict[K, float] = field(factory=OrderedDict, init=False)

    def get(self, key: K, since: float) -> Deferred[Fetched[T]]:
        """A result of a call that began at ``since`` or later. :param since: a time on the clock, not in the future."""
        calls = self._keys.setdefault(key, _Key())
        if calls.running is not None and calls.running.began >= since:
            return calls.running.join()
        if calls.following is None:
            calls.following = _Call(lambda call: self._abandoned(key, calls, call))
        mine = calls.following.join()
        if calls.running is None and calls.timer is None:
            self._start_in_time(key, calls)
        return mine

    def __len__(self) -> int:
        """Keys with a call in flight or about to start."""
        return len(self._keys)

    def _start_in_time(self, key: K, calls: _Key[T]) -> None:
        """Start the following call, now or when the spacing allows."""
        delay = self._starts.get(key, float("-inf")) + self._spacing - self._clock.seconds()
        if delay > 0:
            calls.timer = self._clock.callLater(delay, self._start, key, calls)
        else:
            self._start(key, calls)

    def _start(self, key: K, calls: _Key[T]) -> None:
        calls.timer = None
        call, calls.following = calls.following, None
        assert call is not None
        calls.running = call
        call.began = self._clock.seconds()
        self._remember_start(key, call.began)

        def ended(outcome: Any) -> None:
            self._ended(key, calls, call)
            fetched = outcome if isinstance(outcome, Failure) else Fetched(outcome, call.began)
            fire_all(list(call.waiters), fetched)

        call.start(self._call(key), ended)

    def _remember_start(self, key: K, began: float) -> None:
        """Starts are kept for the length of the spacing."""
        if not self._spacing:
            return
        self._starts[key] = began
        self._starts.move_to_end(key)
        while next(iter(self._starts.values())) + self._spacing <= began:
            self._starts.popitem(last=False)

    def _ended(self, key: K, calls: _Key[T], call: _Call[Fetched[T]]) -> None:
        if calls.running is not call:
            return
        calls.running = None
        if calls.following is not None:
            self._start_in_time(key, calls)
        else:
            self._drop_if_idle(key, calls)

    def _abandoned(self, key: K, calls: _Key[T], call: _Call[Fetched[T]]) -> None:
        if call is calls.following:
            calls.following = None
            if calls.timer is not None:
                calls.timer.cancel()
                calls.timer = None
            self._drop_if_idle(key, calls)
        elif call is calls.running:
            self._ended(key, calls, call)
            call.cancel()

    def _drop_if_idle(self, key: K, calls: _Key[T]) -> None:
        if calls.idle and self._keys.get(key) is calls:
            del self._keys[key]
