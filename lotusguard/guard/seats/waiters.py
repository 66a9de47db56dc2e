# SPDX-License-Identifier: Apache-2.0
"""Joins that wait in one room for a seat which requests in flight hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from attrs import define, field
from twisted.internet.defer import Deferred

from lotusguard.clients.waiting import fire_all


@define(eq=False)
class SeatQueue:
    """The longest waiting is woken first."""

    _waiting: deque[tuple[str, Deferred[None]]] = field(factory=deque, init=False)

    def join(self, user: str, *, again: bool) -> Deferred[None]:
        """:param again: the user was woken and there was no seat; they wait at the head.

        :return: fires when a seat may be free.
        """
        waiter: Deferred[None] = Deferred()
        (self._waiting.appendleft if again else self._waiting.append)((user, waiter))
        return waiter

    def wake_all(self) -> None:
        """Let everybody look for a seat again."""
        waiting, self._waiting = self._waiting, deque()
        fire_all([waiter for _, waiter in waiting], None)

    def wake(self, owns_seat: Callable[[str], bool]) -> None:
        """A seat may be free: wake the first, and everybody who owns a seat by now."""
        if not self._waiting:
            return
        woken: list[Deferred[None]] = []
        left: deque[tuple[str, Deferred[None]]] = deque()
        other_woken = False
        for user, waiter in self._waiting:
            if waiter.called:
                continue
            owns = owns_seat(user)
            if owns or not other_woken:
                other_woken = other_woken or not owns
                woken.append(waiter)
            else:
                left.append((user, waiter))
        self._waiting = left
        fire_all(woken, None)
