# SPDX-License-Identifier: Apache-2.0
"""What moderators do during a soak: policies, power levels and memberships change at random."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from attrs import define
from twisted.logger import Logger

from lotusguard.rules.policy import read_policy
from lotusguard.rules.state import (
    CALL_PERMISSIONS,
    CREATE,
    LEVEL_TYPES,
    POLICY_TYPES,
    POWER_LEVELS,
    ROOM_QUALITY,
    VOICE_LIMIT,
    StateEvent,
)
from tests.soak.users import World

log = Logger()

PUSHED = 0.5
"""Part of the changes that the guard is told of; the others it has to notice."""
MODERATOR = 50


@define
class Changes:
    """Changes rooms at random and records each change.

    :param user_ids: all users of the soak. :param push: tells the guard of a change (``POST /policy-changed``).
    """

    _world: World
    _user_ids: list[str]
    _push: Callable[[bytes], Awaitable[None]]

    async def change_policy(self) -> None:
        await self._world.pause(0.5, 3.0)
        room_id = self._world.dice.choice(self._world.rooms)
        self.set_policy(room_id)
        await self._tell(room_id)

    async def change_level(self) -> None:
        """Promote or demote somebody, preferably somebody in the call."""
        await self._world.pause(0.3, 1.5)
        room_id = self._world.dice.choice(self._world.rooms)
        user = self._somebody(room_id)
        content = self._world.homeserver.rooms[room_id].content(POWER_LEVELS)
        levels = dict(content["users"])
        levels[user] = 0 if levels.get(user, 0) else MODERATOR
        self._world.homeserver.set_state(room_id, POWER_LEVELS, {**content, "users": levels})
        self._record_policy(room_id)
        await self._tell(room_id)

    async def change_membership(self) -> None:
        """Remove somebody from a room, preferably somebody in its call; or let somebody in again."""
        world, dice = self._world, self._world.dice
        await world.pause(0.3, 1.5)
        room_id = dice.choice(world.rooms)
        room = world.homeserver.rooms[room_id]
        outside = [user for user in self._user_ids if room.membership(user) != "join"]
        if outside and dice.random() < len(outside) / 6:
            user = dice.choice(outside)
            if room.membership(user) == "ban":
                world.homeserver.unban(room_id, user)
            world.homeserver.join(room_id, user)
        else:
            user = self._somebody(room_id)
            dice.choice((world.homeserver.leave, world.homeserver.kick, world.homeserver.ban))(room_id, user)
        is_member = room.membership(user) == "join"
        world.oracle.members[room_id, user].change(is_member, world.reactor.seconds())
        world.oracle.counts["users who joined a room" if is_member else "users who left a room or were removed"] += 1
        await self._tell(room_id, user)

    def set_policy(self, room_id: str) -> None:
        """Give a room another policy."""
        dice, homeserver = self._world.dice, self._world.homeserver
        homeserver.set_state(room_id, VOICE_LIMIT, {"max_users": dice.choice((1, 2, 3, 4, 6, 8, 8, None))})
        quality = {key: dice.random() < 0.6 for key in ("allow_screenshare", "allow_camera")}
        homeserver.set_state(room_id, ROOM_QUALITY, quality)
        homeserver.set_state(room_id, CALL_PERMISSIONS, self._permissions() if dice.random() < 0.6 else {})
        self._record_policy(room_id)

    def _permissions(self) -> dict[str, Any]:
        dice = self._world.dice
        sources = ("microphone", "camera", "screen_share")
        content: dict[str, Any] = {key: MODERATOR for key in sources if dice.random() < 0.4}
        if dice.random() < 0.15:
            content["join"] = MODERATOR
        if dice.random() < 0.4:
            users = dice.sample(self._user_ids, 3)
            content["users"] = {user: {dice.choice(sources): dice.random() < 0.5} for user in users}
        return content

    def _record_policy(self, room_id: str) -> None:
        state = self._world.homeserver.rooms[room_id].state
        events = {
            kind: StateEvent(kind, state[kind, ""]["content"], state[kind, ""]["sender"])
            for kind in (*POLICY_TYPES, *LEVEL_TYPES)
            if (kind, "") in state
        }
        assert CREATE in events
        policy, malformed = read_policy(events)
        assert not malformed
        self._world.oracle.policies[room_id].change(policy, self._world.reactor.seconds())

    def _somebody(self, room_id: str) -> str:
        """Somebody who is in the call of a room, or any of its members."""
        dice = self._world.dice
        in_call = [stay.ask.user for _, stay in self._world.sessions if stay.ask.room_id == room_id]
        members = self._world.homeserver.rooms[room_id].members
        return dice.choice(in_call if in_call and dice.random() < 0.7 else sorted(set(members) & set(self._user_ids)))

    async def _tell(self, room_id: str, user: str = "") -> None:
        if self._world.dice.random() >= PUSHED:
            return
        changed = {"room_id": room_id, **({"user": user} if user else {})}
        try:
            await self._push(json.dumps(changed).encode())
        except Exception as error:
            log.debug("the guard was not told of a change: {error}", error=error)
