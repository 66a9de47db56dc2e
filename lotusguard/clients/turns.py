# SPDX-License-Identifier: Apache-2.0
"""A semaphore that is fair between keys: one room with a thousand waiting calls delays no other room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import TypeVar

from attrs import define, field
from twisted.internet.defer import Deferred

T = TypeVar("T")
_Queue = OrderedDict[Deferred[None], None]


class QueueFull(Exception):
    """Too many calls are waiting for a turn."""


@define(eq=False)
class FairSemaphore:
    """At most ``limit`` turns at once. Free turns go round the keys that wait, in order of arrival within a key::

        async with turns.of(room_id):
            ...

    When the queue is full, the newest waiter of the longest queue gives way; the newcomer itself does if no other
    key has more waiting. So one key cannot use the queue up.

    :param limit: turns at once.
    :param queue_limit: waiters of all keys together.
    """

    _limit: int
    _queue_limit: int | None = None
    _free: int = field(init=False)
    _queues: OrderedDict[Hashable, _Queue] = field(factory=OrderedDict, init=False)
    _waiting: int = field(default=0, init=False)
    _giving: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._free = self._limit

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a turn."""
        return self._waiting

    @property
    def idle(self) -> bool:
        """Whether nobody has a turn or waits for one."""
        return self._free == self._limit and not self._queues

    def take(self) -> bool:
        """A turn that is free now, without waiting. :return: whether there was one; `release` must give it back."""
        free = self._free > 0 and not self._queues
        self._free -= free
        return free

    def acquire(self, key: Hashable = "") -> Deferred[None]:
        """A turn, which `release` must give back. Cancelling the Deferred leaves the queue.

        The Deferred fails with `QueueFull`, at once or when others crowd this waiter out.
        """
        turn: Deferred[None] = Deferred(lambda cancelled: self._leave(key, cancelled))
        if self.take():
            turn.callback(None)
        elif self._make_room(key):
            self._queues.setdefault(key, OrderedDict())[turn] = None
            self._waiting += 1
        else:
            turn.errback(QueueFull())
        return turn

    def release(self) -> None:
        """Give a turn back. The next key's first waiter gets it.

        A waiter may end its turn at once, for instance because a circuit is open. So a loop gives the turns away:
        nested calls would exceed Python's limit, and lose turns for ever.
        """
        self._free += 1
        if self._giving:
            return
        self._giving = True
        try:
            while self._free and self._queues:
                self._free -= 1
                self._next().callback(None)
        finally:
            self._giving = False

    def _next(self) -> Deferred[None]:
        """Take the waiter out of the queue who gets the next turn."""
        key, queue = next(iter(self._queues.items()))
        turn, _ = queue.popitem(last=False)
        self._waiting -= 1
        if queue:
            self._queues.move_to_end(key)
        else:
            del self._queues[key]
        return turn

    @asynccontextmanager
    async def of(self, key: Hashable = "") -> AsyncIterator[None]:
        """A turn for the length of an ``async with``. :raises QueueFull:"""
        await self.acquire(key)
        try:
            yield
        finally:
            self.release()

    async def run(self, key: Hashable, work: Callable[[], Awaitable[T]]) -> T:
        """Do some work in a turn of its own. :raises QueueFull:"""
        async with self.of(key):
            return await work()

    def _make_room(self, key: Hashable) -> bool:
        """Whether a newcomer of this key may wait."""
        if self._queue_limit is None or self._waiting < self._queue_limit:
            return True
        if not self._queues:
            return False
        longest = max(self._queues, key=lambda other: len(self._queues[other]))
        if len(self._queues[longest]) <= len(self._queues.get(key, ())) + 1:
            return False
        newest = next(reversed(self._queues[longest]))
        self._leave(longest, newest)
        newest.errback(QueueFull())
        return True

    def _leave(self, key: Hashable, turn: Deferred[None]) -> None:
        queue = self._queues.get(key)
        if queue is None or turn not in queue:
            return
        del queue[turn]
        self._waiting -= 1
        if not queue:
            del self._queues[key]
