# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of running calls: rooms, old tokens, policy changes, hand-made webhooks, metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

from livekit.protocol.models import TrackSource
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from zope.interface import implementer

from lotusguard.clients.http import Answer
from lotusguard.rules.identity import room_alias
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.livekit.tokens import mint

ALICE, BOB, CAROL, DAVE = (f"@{name}:sandbox.local" for name in ("alice", "bob", "carol", "dave"))
USERS = (ALICE, BOB, CAROL, DAVE)
_ids = count(1)


def room_of(sandbox: Sandbox, max_users: int | None = None, **quality: bool) -> str:
    """A room of Alice's with a policy. Bob, Carol and Dave are joined to it too."""
    for user in USERS:
        if user not in sandbox.homeserver.users:
            sandbox.homeserver.add_user(user.split(":")[0][1:])
    room_id: str = sandbox.homeserver.create_room(creator=ALICE, joined=USERS)
    put_policy(sandbox, room_id, max_users, **quality)
    return room_id


def put_policy(sandbox: Sandbox, room_id: str, max_users: int | None = None, **quality: bool) -> None:
    """Write the policy of a room. Omitted keys restrict nothing."""
    limit = {} if max_users is None else {"max_users": max_users}
    sandbox.homeserver.set_state(room_id, "io.lotus.voice_limit", limit)
    sandbox.homeserver.set_state(room_id, "io.lotus.room_quality", quality)


async def change_policy(sandbox: Sandbox, room_id: str, max_users: int | None = None, **quality: bool) -> None:
    """Write it and tell the guard, as the homeserver's module does."""
    put_policy(sandbox, room_id, max_users, **quality)
    answer = await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    assert answer.code == 202


def old_token(user: str, room_id: str, *, device: str = "PHONE", **video: Any) -> str:
    """A token as lk-jwt-service issues it, unchanged by the guard: all grants, valid for an hour."""
    grant = {
        "roomJoin": True, "room": room_alias(room_id), "canPublish": True, "canSubscribe": True,
        "canUpdateOwnMetadata": True, **video,
    }  # fmt: skip
    claims = {"sub": f"{user}:{device}", "identity": f"{user}:{device}", "video": grant}
    return mint(KEY, SECRET, claims, now=time.time(), valid_for=3600)


def published(participant: Participant) -> list[str]:
    """The sources that a participant publishes now."""
    return sorted(TrackSource.Name(track.source) for track in participant.tracks.values())


def counted(sandbox: Sandbox, name: str, **labels: str) -> float:
    """The value of one of the guard's metrics."""
    return sandbox.guard.metrics.registry.get_sample_value(f"lotusguard_{name}", labels) or 0.0


def event_about(kind: str, participant: Participant, **more: Any) -> dict[str, Any]:
    """A webhook as the SFU writes it: camelCase, without zero values."""
    who = {
        "sid": participant.sid, "identity": participant.identity, "state": "ACTIVE",
        "joinedAt": str(int(participant.joined_at)),
    }  # fmt: skip
    return {
        "event": kind, "room": {"sid": "RM_1", "name": participant.room.name}, "participant": who,
        "id": f"EV_hand{next(_ids)}", "createdAt": str(int(time.time())), **more,
    }  # fmt: skip


async def tell(
    sandbox: Sandbox, event: Mapping[str, Any] | bytes, *, authorization: str | None = None, **headers: str
) -> Answer:
    """POST a hand-made webhook. :param authorization: replaces the correct header."""
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    given = {"Content-Type": "application/webhook+json", **headers}
    given["Authorization"] = sandbox.livekit.webhooks.authorization(body) if authorization is None else authorization
    return await sandbox.request("POST", f"{sandbox.url}/sfu_webhook", body, given)


async def seen_in(sandbox: Sandbox, room_id: str) -> list[tuple[str, bool]]:
    """The occupants of a room's call as the guard reports them: user, and whether they have a seat."""
    answer = await sandbox.operator("GET", "/rooms")
    rooms = {room["room_id"]: room["present"] for room in json.loads(answer.body)["rooms"]}
    return sorted((who["user"], who["seated"]) for who in rooms.get(room_id, ()))


@contextmanager
def logged() -> Iterator[list[LogEvent]]:
    """Collects the log events of the ``with`` block."""
    events: list[LogEvent] = []

    @implementer(ILogObserver)
    def observe(event: LogEvent) -> None:
        events.append(event)

    globalLogPublisher.addObserver(observe)
    try:
        yield events
    finally:
        globalLogPublisher.removeObserver(observe)


def named(events: list[LogEvent], name: str) -> list[str]:
    """The texts of those log events."""
    return [formatEvent(event) for event in events if event.get("event_name") == name]


def crashes(events: list[LogEvent]) -> list[str]:
    """The texts of log events with a failure."""
    return [formatEvent(event) for event in events if "log_failure" in event]
