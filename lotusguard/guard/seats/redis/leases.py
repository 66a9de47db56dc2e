# SPDX-License-Identifier: Apache-2.0
"""Which guard reconciles which room: one at a time lists its participants periodically, and removes people."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient, Script
from lotusguard.guard.seats.redis.scripts import PREFIX, lua

LEASE_SECONDS = 8.0
"""Every pass over a room renews its lease. It ends so long after the last one, unless the guard gives it up."""
LEASES_KEPT = 20_000
ENDS_SOON = 4.0
"""A lease of another guard that has less than so many seconds left was not renewed at its last round. This guard does
not wait for its own next round then: it asks for the lease as soon as that ends."""
ENFORCE_CHANNEL, CHANGED_CHANNEL = PREFIX + "enforce", PREFIX + "changed"
LEASE = Script(lua("lease"))
CONFIRM = Script(
    "if redis.call('HGET', KEYS[1], 'guard') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'token') ~= ARGV[2]"
    " then return 0 end return redis.call('PTTL', KEYS[1])"
)
"""How many milliseconds the lease lasts; 0 if it is another guard's, or another token counts."""


@define(eq=False)
class RoomLeases:
    """The leases of one guard, and what guards tell each other about rooms.

    :param guard: this guard's name.
    :param seconds: for which an acquired lease lasts.
    :ivar enforce: called with an SFU room that another guard wants to be enforced at once.
    :ivar changed: called with a room, and a user or "", whose state another guard was told to have changed, and how it
        was told.
    :ivar ended: called with a room when the lease that another guard had has ended, unless that guard renewed it since.
    :ivar held: the fencing tokens of the leases that this guard had last. They grow each time a lease changes hands.
    """

    _redis: RedisClient
    _guard: str
    _clock: IReactorTime
    _seconds: float = LEASE_SECONDS
    enforce: Callable[[str], None] = field(init=False, default=lambda alias: None)
    changed: Callable[[str, str, str], object] = field(init=False, default=lambda room_id, user, how: None)
    ended: Callable[[str], object] = field(init=False, default=lambda room_id: None)
    held: OrderedDict[str, int] = field(init=False, factory=OrderedDict)
    _ending: dict[str, IDelayedCall] = field(init=False, factory=dict)
    _stopped: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._redis.listen(ENFORCE_CHANNEL, self._asked)
        self._redis.listen(CHANGED_CHANNEL, self._told)

    async def acquire(self, room_id: str) -> bool:
        """Get or renew the lease of a room.

        While Redis is known to be gone, every guard acts for itself. If only this call fails, this guard does not act
        now: it may have been stopped for a while, and another guard may have the lease.
        """
        if not self._redis.available:
            return True
        asked = self._clock.seconds()
        try:
            token = int(await self._redis.run(LEASE, _keys(room_id), self._guard, str(int(self._seconds * 1000))))
        except DependencyFailed:
            return False
        self._ask_when_ended(room_id, -token / 1000)
        if token <= 0 or self._clock.seconds() >= asked + self._seconds:
            self.held.pop(room_id, None)
            return False
        self.held[room_id] = token
        self.held.move_to_end(room_id)
        while len(self.held) > LEASES_KEPT:
            self.held.popitem(last=False)
        return True

    async def confirms(self, room_id: str) -> bool:
        """Whether the lease that was acquired last still counts. It is asked before somebody is removed: since the pass
        began, the lease may have expired and gone to another guard, and so it may while the answer is on its way.
        """
        if not self._redis.available:
            return True
        asked, token = self._clock.seconds(), self.held.get(room_id)
        try:
            left = int(await self._redis.run(CONFIRM, _keys(room_id), self._guard, str(token)))
        except DependencyFailed:
            return False
        return self._clock.seconds() < asked + left / 1000

    async def hand_over(self) -> None:
        """Give up all leases: this guard stops."""
        self._stopped = True
        for ending in self._ending.values():
            ending.cancel()
        self._ending.clear()
        while self.held:
            room_id, _ = self.held.popitem()
            with suppress(DependencyFailed):
                await self._redis.run(LEASE, _keys(room_id), self._guard, "0")

    def _ask_when_ended(self, room_id: str, left: float) -> None:
        """:param left: seconds that another guard's lease lasts; negative if there is none."""
        before = self._ending.pop(room_id, None)
        if before is not None:
            before.cancel()
        if 0 < left < ENDS_SOON and len(self._ending) < LEASES_KEPT and not self._stopped:
            self._ending[room_id] = self._clock.callLater(left, self._has_ended, room_id)

    def _has_ended(self, room_id: str) -> None:
        del self._ending[room_id]
        self.ended(room_id)

    async def ask_holder(self, alias: str) -> None:
        """Let the guard that has the lease enforce an SFU room at once."""
        await self._publish(ENFORCE_CHANNEL, alias)

    async def tell_changed(self, room_id: str, user: str, how: str) -> None:
        """Tell the other guards that a room's state, or a user's membership, has changed."""
        await self._publish(CHANGED_CHANNEL, room_id, user, how)

    async def _publish(self, channel: str, *words: str) -> None:
        with suppress(DependencyFailed):  # reconciling finds it a few seconds later
            await self._redis.publish(channel, json.dumps([self._guard, *words]))

    def _asked(self, message: str) -> None:
        guard, alias = json.loads(message)
        if guard != self._guard:
            self.enforce(alias)

    def _told(self, message: str) -> None:
        guard, room_id, user, how = json.loads(message)
        if guard != self._guard:
            self.changed(room_id, user, how)


def _keys(room_id: str) -> tuple[str, str]:
    return f"{PREFIX}lease:{{{room_id}}}", f"{PREFIX}fence:{{{room_id}}}"
