# SPDX-License-Identifier: Apache-2.0
"""How many rooms one user's joins may look up at once, so that no user can keep the homeserver from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attrs import define, field
from twisted.internet.defer import TimeoutError

from lotusguard.clients.waiting import FairSemaphore, QueueFull
from lotusguard.guard.joins.join import Join

ROOMS_AT_ONCE = 8
"""Rooms that are looked up at once for one user's joins."""
ROOMS_QUEUED = 32
"""Joins of one user that may wait for a turn."""


RETRY = 2.0
"""Seconds after which fewer joins may wait."""


class TooManyLookups(Exception):
    """Too many joins of this user want to look rooms up."""


@define(eq=False)
class UserTurns:
    """Turns of each user to look rooms up. Joins into a room that is being looked up for the user need none."""

    _users: dict[str, FairSemaphore] = field(factory=dict, init=False)
    _rooms: Counter[tuple[str, str]] = field(factory=Counter, init=False)

    @asynccontextmanager
    async def of(self, join: Join) -> AsyncIterator[None]:
        """A turn to look the join's room up. The wait for it takes nothing from the join's time for lookups.

        :raises TooManyLookups: also if the turn does not come in time.
        """
        user, key = join.user, (join.user, join.room_id)
        if key in self._rooms:
            yield
            return
        turns = self._users.setdefault(user, FairSemaphore(ROOMS_AT_ONCE, ROOMS_QUEUED))
        try:
            with join.waiting():
                await join.deadline.sooner(join.lookup_timeout).wait(turns.acquire())
        except (QueueFull, TimeoutError):
            raise TooManyLookups from None
        self._rooms[key] += 1
        try:
            yield
        finally:
            self._rooms[key] -= 1
            if not self._rooms[key]:
                del self._rooms[key]
            turns.release()
            if turns.idle and self._users.get(user) is turns:
                del self._users[user]
