# SPDX-License-Identifier: Apache-2.0
"""What the demo observes: the call as the SFU and the guard see it. Sandbox."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from attrs import frozen
from twisted.internet.task import deferLater

from lotusguard.clients.http import Answer
from lotusguard.rules.identity import user_of
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.terminal import StepFailed

PATIENCE = 6.0
"""Seconds within which the guard has to act by itself."""


def expect(holds: object, instead: str) -> None:
    """:raises StepFailed: if the first argument is false; ``instead`` says what was seen."""
    if not holds:
        raise StepFailed(instead)


@frozen
class Observer:
    """Observes the call of one Matrix room."""

    sandbox: Sandbox
    room_id: str

    def participants(self) -> list[tuple[str, str]]:
        """User and identity of every participant, according to the SFU."""
        issued = {(token.alias, token.identity): token.user for token in self.sandbox.upstream.issued}
        aliases = {token.alias for token in self.sandbox.upstream.issued if token.room == self.room_id}
        return [
            (issued.get((alias, identity), user_of(identity)), identity)
            for alias, room in self.sandbox.livekit.rooms.items()
            if alias in aliases
            for identity in room.participants
        ]

    def users(self) -> list[str]:
        """The localparts of the users in the call, sorted."""
        return sorted({user.partition(":")[0][1:] for user, _ in self.participants()})

    async def seats_held(self, expected: int) -> int:
        """``expected`` if the guard counts so many seats, else 0."""
        rooms = (await self.rooms())["rooms"]
        held: int = next((room["seats_held"] for room in rooms if room["room_id"] == self.room_id), 0)
        return held if held == expected else 0

    async def last_decision(self) -> dict[str, Any]:
        decision: dict[str, Any] = (await self.rooms())["decisions"][-1]
        return decision

    async def rooms(self) -> dict[str, Any]:
        """The guard's ``/rooms``."""
        rooms: dict[str, Any] = json.loads((await self.sandbox.operator("GET", "/rooms")).body)
        return rooms

    async def readyz(self) -> tuple[Answer, dict[str, Any]]:
        answer = await self.sandbox.operator("GET", "/readyz")
        return answer, json.loads(answer.body)

    async def until(self, condition: Callable[[], Any], otherwise: str) -> Any:
        """Wait for a condition. :raises StepFailed: if it does not hold within `PATIENCE`."""
        end = self.sandbox.reactor.seconds() + PATIENCE
        while True:
            held = condition()
            if isinstance(held, Awaitable):
                held = await held
            if held:
                return held
            expect(self.sandbox.reactor.seconds() < end, f"{otherwise}, {PATIENCE:.0f} s later")
            await deferLater(self.sandbox.reactor, 0.02)
