# SPDX-License-Identifier: Apache-2.0
"""The stand-in for LiveKit in a big event: one call of thousands, whose participants come and go, with webhooks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections import deque
from itertools import count
from typing import Any

from attrs import define, field
from google.protobuf.json_format import MessageToJson
from livekit.protocol.models import ParticipantInfo, Room
from livekit.protocol.webhook import WebhookEvent

from benchmarks.prepared_answers import DEVICE, KEY, SECRET, SfuRooms, cached_alias, participant, room_id, stranger_id

ARRIVES_AFTER = 0.3
"""Seconds from a token to its participant's arrival."""


@define
class BigEvent:
    """The call of room 0. Whoever gets a token arrives, and the participant who was there longest leaves."""

    sfu: SfuRooms
    people: int
    port: int
    _present: deque[str] = field(init=False, factory=deque)
    _queue: asyncio.Queue[WebhookEvent] = field(init=False, factory=asyncio.Queue)
    _numbers: Any = field(init=False, factory=lambda: count(1))
    _sender: asyncio.Task[None] | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self.sfu.rooms[self.alias] = {}
        for number in range(self.people):
            self._add(f"{stranger_id(number, 0)}:{DEVICE}")
        self._sender = asyncio.ensure_future(self._send_webhooks())

    @property
    def alias(self) -> str:
        return cached_alias(room_id(0))

    def members(self) -> bytes:
        """The admin API's list of the room's members."""
        users = [identity.rpartition(":")[0] for identity in self._present]
        return json.dumps({"members": users, "total": len(users)}).encode()

    def token_issued(self, body: bytes) -> None:
        """Somebody was given a token, and arrives soon."""
        user = json.loads(body)["openid_token"]["access_token"]
        asyncio.get_running_loop().call_later(ARRIVES_AFTER, self._arrive, f"{user}:{DEVICE}")

    def _add(self, identity: str) -> ParticipantInfo:
        info = participant(f"PA_e{next(self._numbers)}", identity, set())
        self.sfu.put(self.alias, info)
        self._present.append(identity)
        return info

    def _arrive(self, identity: str) -> None:
        if identity in self.sfu.rooms[self.alias]:
            return
        info = self._add(identity)
        self._tell("participant_joined", info)
        self._tell("track_published", info)
        self._tell("participant_left", self.sfu.take(self.alias, self._present.popleft()))

    def _tell(self, event: str, info: ParticipantInfo) -> None:
        room = Room(sid="RM_event", name=self.alias, num_participants=len(self._present))
        identifier = f"EV_{next(self._numbers)}"
        self._queue.put_nowait(
            WebhookEvent(event=event, room=room, participant=info, id=identifier, created_at=int(time.time()))
        )

    async def _send_webhooks(self) -> None:
        """One after the other, as LiveKit does for each room."""
        reader = writer = None
        while True:
            body = MessageToJson(await self._queue.get(), indent=None).encode()
            if reader is None or writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(
                b"POST /sfu_webhook HTTP/1.1\r\nHost: bench\r\nContent-Type: application/webhook+json\r\n"
                b"Authorization: %b\r\nContent-Length: %d\r\n\r\n%b" % (_signed(body), len(body), body)
            )
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (OSError, asyncio.IncompleteReadError):
                return
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
            await reader.readexactly(int(length or b"0"))

    def stop(self) -> None:
        if self._sender is not None:
            self._sender.cancel()


def _signed(body: bytes) -> bytes:
    now = int(time.time())
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    claims = {"exp": now + 300, "iss": KEY, "nbf": now, "sha256": digest}
    signed = b".".join(
        base64.urlsafe_b64encode(json.dumps(part, separators=(",", ":")).encode()).rstrip(b"=")
        for part in ({"alg": "HS256", "typ": "JWT"}, claims)
    )
    signature = hmac.digest(SECRET.encode(), signed, "sha256")
    return signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")
