# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of a guard whose account is in rooms of a real homeserver, without admin rights."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from attrs import frozen
from twisted.internet import reactor
from twisted.internet.task import deferLater

from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import published
from tests.conftest import until
from tests.homeserver import Homeserver, User
from tests.residence.helpers import NEVER
from tests.synapse import Guarded

LIMIT, QUALITY = "io.lotus.voice_limit", "io.lotus.room_quality"
SCREEN_SHARE = 3
HEARD_WITHIN = 3.0
"""Seconds, on a very busy machine; usually 0.1. Without a push it would be ten."""
PATIENCE = 60.0
"""Seconds, on a busy machine; usually well below one."""
NO_LOOKUPS: dict[str, object] = {"guard_policy_ttl": NEVER, "guard_membership_interval": NEVER}
"""Settings of a guard that looks nothing up again: what it knows is new, it has heard."""


CHANGES = 20 if os.environ.get("LATENCIES") else 5
"""How many changes a latency is measured with."""


def say(text: str) -> None:
    """Print a figure; ``pytest -s`` shows it."""
    sys.stdout.write(f"\n{text}\n")


@frozen
class Latency:
    """Seconds, of a number of changes."""

    median: float
    worst: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        return cls(median(seconds), max(seconds))

    def __str__(self) -> str:
        return f"median {1000 * self.median:.0f} ms, worst {1000 * self.worst:.0f} ms"


class Residents:
    """A guard with an account of its own, and three users. Everything but the homeserver is the sandbox's."""

    def __init__(self, guarded: Guarded, account: User | None, users: list[User]) -> None:
        self.guarded, self._account = guarded, account
        self.homeserver: Homeserver = guarded.synapse
        self.sandbox: Sandbox = guarded.sandbox
        self.alice, self.bob, self.carol = users

    @property
    def account(self) -> User:
        """The guard's."""
        assert self._account is not None
        return self._account

    @classmethod
    def looking_up(cls, guarded: Guarded, users: list[User]) -> Residents:
        """A guard that is in no room, and reads all of them through the admin API."""
        return cls(guarded, None, users)

    @classmethod
    async def of(cls, guarded: Guarded, **settings: object) -> Residents:
        """Start the guard again, with an account of its own."""
        homeserver, sandbox = guarded.synapse, guarded.sandbox
        account = await homeserver.register("guard")
        users = [await homeserver.register(name) for name in ("alice", "bob", "carol")]
        residents = cls(guarded, account, users)
        await sandbox.guard.stopService()
        await residents.start_guard(**settings)
        return residents

    async def start_guard(self, **settings: object) -> None:
        """Start the guard, and wait until its sync is alive."""
        await self.sandbox.start_guard(matrix_token=self.account.token, **settings)
        await until(lambda: self.sandbox.guard.residence.alive, PATIENCE)

    async def room(self, **how: Any) -> str:
        """A room of Alice's with Bob and Carol, to which the guard was invited."""
        room_id = await self.homeserver.room_of(self.alice, self.bob, self.carol, **how)
        await self.invite(room_id)
        return room_id

    async def invite(self, room_id: str) -> None:
        """Invite the guard; wait until it knows the room."""
        await self.homeserver.change_membership(self.alice, room_id, "invite", self.account)
        residence = self.sandbox.guard.residence
        await until(lambda: residence.state_of(room_id) is not None, PATIENCE)
        await until(lambda: residence.is_joined(room_id, self.alice.user_id), PATIENCE)

    async def put(self, room_id: str, kind: str, content: dict[str, Any]) -> None:
        await self.homeserver.set_state(self.alice, room_id, kind, content)

    async def set_limit(self, room_id: str, limit: int) -> None:
        """Set the limit; wait until the guard knows it."""
        await self.put(room_id, LIMIT, {"max_users": limit})
        await self.limit_is(room_id, limit)

    async def limit_is(self, room_id: str, limit: int | None) -> None:
        """Wait until the guard has heard of this limit."""

        def known() -> bool:
            pushed = self.sandbox.guard.residence.state_of(room_id)
            event = pushed.events.get(LIMIT) if pushed is not None else None
            return (event.mapping.get("max_users") if event is not None else None) == limit

        await until(known, PATIENCE)

    async def notices(self, room_id: str) -> list[str]:
        """What the guard said in a room and did not redact, oldest first."""
        said = await self.homeserver.notices(self.alice, room_id, self.account)
        return [str(event["content"]["body"]) for event in said]

    async def said(self, room_id: str, part: str) -> str:
        """Wait for a notice that contains this. :return: its event ID."""
        end = reactor.seconds() + PATIENCE
        while True:
            said = await self.homeserver.notices(self.alice, room_id, self.account)
            found = [event["event_id"] for event in said if part in event["content"]["body"]]
            if found:
                return str(found[-1])
            assert reactor.seconds() < end, f"no notice with {part!r} in {said}"
            await deferLater(reactor, 0.05)

    async def command(self, room_id: str, text: str, answer: str) -> None:
        """Have Alice write a command; wait for an answer that contains this."""
        await self.homeserver.say(self.alice, room_id, text)
        await self.said(room_id, answer)


async def latency_of(
    residents: Residents,
    room_id: str,
    participant: Participant,
    changes: int = CHANGES,
    before_each: Callable[[], Awaitable[None]] | None = None,
) -> Latency:
    """How long it takes from sending a state event until a screen share is revoked on the SFU."""
    seconds = []
    for _ in range(changes):
        await residents.put(room_id, QUALITY, {"allow_screenshare": True})
        await until(lambda: participant.grant.may_publish(SCREEN_SHARE), PATIENCE)
        participant.publish("SCREEN_SHARE")
        if before_each is not None:
            await before_each()
        began = reactor.seconds()
        await residents.put(room_id, QUALITY, {"allow_screenshare": False})
        await until(lambda: not published(participant), PATIENCE)
        seconds.append(reactor.seconds() - began)
    return Latency.of(seconds)
