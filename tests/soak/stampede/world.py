# SPDX-License-Identifier: Apache-2.0
"""What the guards of a stampede rely on: a homeserver, lk-jwt-service, and an SFU that people enter and leave.

They are cheap, because thousands of joins go through them: benchmarks.prepared_answers makes the tokens.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any
from urllib.parse import parse_qs, unquote

from attrs import Factory, define, field
from google.protobuf import json_format
from livekit.protocol.models import ParticipantInfo, ParticipantPermission
from livekit.protocol.room import (
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsResponse,
    RemoveParticipantResponse,
    RoomParticipantIdentity,
)
from livekit.protocol.webhook import WebhookEvent

from benchmarks.dependencies import JSON, PROTOBUF, Http
from benchmarks.prepared_answers import KEY, SECRET, SERVER_NAME, token_answer
from lotusguard.rules.jwt import read_unverified
from lotusguard.rules.state import VOICE_LIMIT
from lotusguard.sandbox.livekit.tokens import mint

_sids = count(1)


@define(eq=False)
class Sfu:
    """Who is in which SFU room. Webhooks go to one guard, as LiveKit is configured.

    :ivar seats: the limit of every room.
    :ivar over: since when an SFU room has had more people than seats; only those that have.
    :ivar ended: told of each time that this ended: the SFU room, from when to when.
    :ivar removed: how many people the guards removed.
    """

    seats: int
    clock: Callable[[], float] = time.monotonic
    rooms: dict[str, dict[str, ParticipantInfo]] = Factory(dict)
    over: dict[str, float] = Factory(dict)
    ended: list[tuple[str, float, float]] = Factory(list)
    removed: int = 0
    tell: Callable[[bytes, dict[str, str]], None] = field(default=lambda body, headers: None)

    def connect(self, token: str) -> str:
        """Enter with a token. :return: the participant's identity."""
        claims = read_unverified(token)
        assert claims is not None
        alias, identity = claims["video"]["room"], claims["sub"]
        permission = ParticipantPermission(can_subscribe=True, can_publish=True, can_publish_data=True)
        info = ParticipantInfo(
            sid=f"PA_{next(_sids)}", identity=identity, state=ParticipantInfo.State.ACTIVE, joined_at=int(time.time()),
            joined_at_ms=int(time.time() * 1000), permission=permission,
        )  # fmt: skip
        self.rooms.setdefault(alias, {})[identity] = info
        self._count(alias)
        self._tell("participant_joined", alias, info)
        return str(identity)

    def leave(self, alias: str, identity: str) -> None:
        info = self.rooms.get(alias, {}).pop(identity, None)
        if info is not None:
            self._count(alias)
            self._tell("participant_left", alias, info)

    def users(self, alias: str) -> set[str]:
        return {identity.rpartition(":")[0] for identity in self.rooms.get(alias, ())}

    def _count(self, alias: str) -> None:
        now = self.clock()
        if len(self.users(alias)) > self.seats:
            self.over.setdefault(alias, now)
        elif alias in self.over:
            self.ended.append((alias, self.over.pop(alias), now))

    def _tell(self, kind: str, alias: str, info: ParticipantInfo) -> None:
        event = WebhookEvent(event=kind, participant=info, id=f"EV_{next(_sids)}", created_at=int(time.time()))
        event.room.name = alias
        body = json_format.MessageToJson(event).encode()
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        token = mint(KEY, SECRET, {"sha256": digest}, now=time.time(), valid_for=300)
        self.tell(body, {"Authorization": token, "Content-Type": "application/webhook+json"})


@define(eq=False)
class World:
    """Counters and the SFU, shared by the stand-ins.

    :ivar upstream_delay: seconds until lk-jwt-service answers.
    """

    sfu: Sfu
    upstream_delay: float = 0.01
    calls: Counter[str] = Factory(Counter)
    bytes: Counter[str] = Factory(Counter)

    async def start(self) -> dict[str, int]:
        """Listen. :return: the ports."""
        loop, ports = asyncio.get_running_loop(), {}
        for kind in (Upstream, Livekit, Synapse):
            server = await loop.create_server(lambda kind=kind: kind(self), "127.0.0.1", 0, backlog=8192)  # type: ignore[misc]
            ports[kind.name] = server.sockets[0].getsockname()[1]
        return ports


class Upstream(Http):
    """lk-jwt-service: a signed token for every caller, after a moment."""

    name = "upstream"
    world: Any

    def asked(self, target: str, head: bytes, body: bytes) -> None:
        answer = token_answer(body) if body and target == "/sfu/get" else b""
        asyncio.get_running_loop().call_later(self.world.upstream_delay, self.answer, answer, head)


class Livekit(Http):
    """RoomService."""

    name = "livekit"
    world: Any

    def asked(self, target: str, head: bytes, body: bytes) -> None:
        method, sfu = target.rpartition("/")[2], self.world.sfu
        if method == "ListParticipants":
            people = sfu.rooms.get(ListParticipantsRequest.FromString(body).room, {})
            self.answer(ListParticipantsResponse(participants=people.values()).SerializeToString(), head, PROTOBUF)
        elif method == "ListRooms":
            listed = ListRoomsResponse()
            for alias, people in sfu.rooms.items():
                if people:
                    listed.rooms.add(sid="RM_" + alias[:8], name=alias, num_participants=len(people))
            self.answer(listed.SerializeToString(), head, PROTOBUF)
        elif method == "RemoveParticipant":
            asked = RoomParticipantIdentity.FromString(body)
            known = asked.identity in sfu.rooms.get(asked.room, {})
            sfu.removed += known
            sfu.leave(asked.room, asked.identity)
            if known:
                self.answer(RemoveParticipantResponse().SerializeToString(), head, PROTOBUF)
            else:
                self._error(head, "not_found")
        elif method == "GetParticipant":
            asked = RoomParticipantIdentity.FromString(body)
            info = sfu.rooms.get(asked.room, {}).get(asked.identity)
            if info is None:
                self._error(head, "not_found")
            else:
                self.answer(info.SerializeToString(), head, PROTOBUF)
        else:
            self._error(head, "bad_route")

    def _error(self, head: bytes, code: str) -> None:
        self.answer(json.dumps({"code": code, "msg": code}).encode(), head, status=b"404 Not Found")


class Synapse(Http):
    """The homeserver: every room has the same limit. Memberships are not asked for."""

    name = "synapse"
    world: Any

    def asked(self, target: str, head: bytes, body: bytes) -> None:
        path, _, query = target.partition("?")
        asked = parse_qs(query)
        parts = path.split("/")
        if path.startswith("/_synapse/admin/v1/rooms/"):
            room = unquote(parts[5])
            event = {
                "type": VOICE_LIMIT, "state_key": "", "sender": f"@a:{SERVER_NAME}", "room_id": room,
                "content": {"max_users": self.world.sfu.seats},
            }  # fmt: skip
            wanted = asked.get("type", [VOICE_LIMIT])[0] == VOICE_LIMIT
            self.answer(json.dumps({"state": [event] if wanted else []}).encode(), head)
        elif path.endswith("/whoami"):
            self.answer(json.dumps({"user_id": f"@admin:{SERVER_NAME}"}).encode(), head)
        elif path.endswith("/openid/userinfo"):
            self.answer(json.dumps({"sub": asked["access_token"][0]}).encode(), head)
        else:
            self.answer(b"{}", head, JSON, b"404 Not Found")
