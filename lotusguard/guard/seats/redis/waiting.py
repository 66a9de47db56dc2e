# SPDX-License-Identifier: Apache-2.0
"""The joins of this guard that wait for a seat, until a request in flight at any guard has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.waiting import fire_all, run_in_background

log = Logger()

POLL_INTERVAL = 1.0
"""Seconds after which the first in a queue looks again although nothing was published: messages may be lost."""
OWNERS_ASKED = 64
"""Waiting users who are asked about at once."""

_Waiter = tuple[str, Deferred[None]]


@define(eq=False)
class WaitingJoins:
    """One queue for each room.

    :param owners: asks which of some users own a seat of a room by now.
    """

    _owners: Callable[[str, Sequence[str]], Awaitable[Sequence[str]]]
    _reactor: Any
    _queues: dict[str, deque[_Waiter]] = field(init=False, factory=dict)
    _polls: dict[str, IDelayedCall] = field(init=False, factory=dict)

    async def wait(self, room_id: str, user: str, *, again: bool) -> None:
        """See `SeatBook.wait_for_seat`."""
        queue = self._queues.setdefault(room_id, deque())
        waiter: Deferred[None] = Deferred()
        (queue.appendleft if again else queue.append)((user, waiter))
        self._poll_later(room_id)
        await waiter

    def wake_all(self, room_id: str) -> None:
        fire_all([waiter for _, waiter in self._queues.pop(room_id, ())], None)

    def wake(self, room_id: str) -> None:
        """Wake the first, and everybody who owns a seat by now."""
        queue = self._queues.get(room_id)
        if queue is None:
            return
        while queue:
            _, waiter = queue.popleft()
            if not waiter.called:
                waiter.callback(None)
                break
        waiting = [user for user, waiter in queue if not waiter.called]
        if waiting:
            run_in_background(self._wake_owners(room_id, waiting[:OWNERS_ASKED]), _report)
        elif not queue:
            self._queues.pop(room_id, None)

    def stop(self) -> None:
        for poll in self._polls.values():
            poll.cancel()
        self._polls.clear()
        for room_id in list(self._queues):
            self.wake_all(room_id)

    async def _wake_owners(self, room_id: str, users: Sequence[str]) -> None:
        owners = set(await self._owners(room_id, users))
        queue = self._queues.get(room_id, deque())
        woken = [waiter for user, waiter in queue if user in owners]
        left = deque((user, waiter) for user, waiter in queue if user not in owners and not waiter.called)
        if left:
            self._queues[room_id] = left
        else:
            self._queues.pop(room_id, None)
        fire_all(woken, None)

    def _poll_later(self, room_id: str) -> None:
        if room_id not in self._polls:
            self._polls[room_id] = self._reactor.callLater(POLL_INTERVAL, self._poll, room_id)

    def _poll(self, room_id: str) -> None:
        del self._polls[room_id]
        self.wake(room_id)
        if room_id in self._queues:
            self._poll_later(room_id)


def _report(failure: Failure) -> None:
    if not failure.check(DependencyFailed):
        log.failure("could not ask who owns a seat", failure)
