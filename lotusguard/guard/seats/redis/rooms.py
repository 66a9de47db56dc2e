# SPDX-License-Identifier: Apache-2.0
"""The Matrix rooms of which Redis knows anything. Many short questions, asked when the connection is less busy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from attrs import frozen

from lotusguard.clients.redis.client import RedisClient, when_less_busy
from lotusguard.guard.seats.redis.scripts import OCCUPIED_ROOM, room_key


@frozen(eq=False)
class StoredRooms:
    _redis: RedisClient
    _reactor: Any

    async def ids(self, most: int) -> Sequence[str]:
        """Room IDs. :param most: so many of them at most."""
        before, after = room_key("\0").split("\0")
        names: list[str] = []
        cursor = "0"
        while True:
            scan = partial(self._redis.call, "SCAN", cursor, "MATCH", f"{before}*{after}", "COUNT", 500)
            cursor, found = await when_less_busy(self._reactor, scan)
            names += [key[len(before) : -len(after)] for key in found]
            if cursor == "0" or len(names) >= most:
                break
        return sorted(set(names))[:most]

    async def was_occupied(self, room_id: str, seconds: float) -> bool:
        """Whether anybody has been in a room, or had a token, in the last so many seconds. Each listing of an occupied
        room begins the time anew after which Redis deletes it."""
        ask = partial(self._redis.call, "PTTL", room_key(room_id))
        return int(await when_less_busy(self._reactor, ask)) / 1000 >= OCCUPIED_ROOM - seconds
