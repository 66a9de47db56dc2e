# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the three dependencies, in one process, fast enough not to be the bottleneck.

``python -m benchmarks.dependencies`` prints its ports as a JSON line and then reads JSON lines with changes to its
`Scene` from standard input; it answers each with a line of its counters.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any
from urllib.parse import parse_qs, unquote

from attrs import evolve
from google.protobuf.json_format import MessageToDict
from livekit.protocol.room import ListParticipantsRequest, RoomParticipantIdentity, UpdateParticipantRequest

from benchmarks.churn import BigEvent
from benchmarks.prepared_answers import (
    MATRIX_TOKEN,
    SERVER_NAME,
    Scene,
    SfuRooms,
    cached_state,
    cached_state_forget,
    joined_rooms,
    room_id,
    room_members,
    token_answer,
)

JSON = b"application/json"
PROTOBUF = b"application/protobuf"
_NOT_FOUND = b'{"code": "not_found", "msg": "participant does not exist"}'
_CORS = (
    b"Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Methods: POST\r\n"
    b"Access-Control-Allow-Headers: Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token\r\n"
)


class World:
    """What all three share: the scene, the participants and the counters."""

    def __init__(self) -> None:
        self.scene = Scene()
        self.sfu = SfuRooms.of(self.scene)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.updated_at: list[float] = []
        self.event: BigEvent | None = None

    def change(self, changes: dict[str, Any]) -> None:
        if changes.pop("reset", False):
            self.calls.clear()
            self.bytes.clear()
            self.updated_at.clear()
        event = changes.pop("event", None)
        if event is not None:
            if self.event is not None:
                self.event.stop()
            self.event = BigEvent(self.sfu, event["people"], event["port"]) if event else None
        if not changes:
            return
        people = {"rooms", "participants"} & set(changes)
        self.scene = evolve(self.scene, **changes)
        cached_state_forget()
        if people:
            self.sfu = SfuRooms.of(self.scene)


class Http(asyncio.Protocol):
    """HTTP/1.1 as far as the callers here speak it: length-framed bodies, kept-alive connections, no pipelining."""

    name = ""
    extra = b""

    def __init__(self, world: World) -> None:
        self.world = world
        self.buffer = b""
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end]
        lower = head.lower()
        length = 0
        at = lower.find(b"\r\ncontent-length:")
        if at >= 0:
            length = int(lower[at + 17 :].split(b"\r\n", 1)[0])
        body = self.buffer[end + 4 : end + 4 + length]
        if len(body) < length:
            return
        self.buffer = b""
        target = head.split(b" ", 2)[1].decode("ascii")
        self.world.calls[self.name] += 1
        self.asked(target, lower, body)

    def asked(self, target: str, head: bytes, body: bytes) -> None:
        raise NotImplementedError

    def answer(self, body: bytes, head: bytes, kind: bytes = JSON, status: bytes = b"200 OK") -> None:
        close = b"\r\nconnection: close" in head
        self.world.bytes[self.name] += len(body)
        self.transport.write(
            b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b%b\r\n%b"
            % (status, kind, len(body), self.extra, b"Connection: close\r\n" if close else b"", body)
        )
        if close:
            self.transport.close()


class Upstream(Http):
    """lk-jwt-service: a signed token for every caller."""

    name = "upstream"
    extra = _CORS

    def asked(self, target: str, head: bytes, body: bytes) -> None:
        if target == "/sfu_webhook":
            self.answer(b"", head)
            return
        answer = token_answer(body) if body else b""
        if body and self.world.event is not None:
            self.world.event.token_issued(body)
        if self.world.scene.upstream_delay:
            asyncio.get_running_loop().call_later(self.world.scene.upstream_delay, self.answer, answer, head)
        else:
            self.answer(answer, head)


class Livekit(Http):
    """RoomService, in protobuf and in JSON."""

    name = "livekit"

    def asked(self, target: str, head: bytes, body: bytes) -> None:
        if self.world.scene.hang:
            return
        method = target.rpartition("/")[2]
        as_json = b"\r\ncontent-type: application/json" in head
        sfu = self.world.sfu
        if method == "ListParticipants":
            alias = json.loads(body)["room"] if as_json else ListParticipantsRequest.FromString(body).room
            self.answer(sfu.participants(alias, as_json=as_json), head, JSON if as_json else PROTOBUF)
        elif method == "ListRooms":
            self.answer(sfu.listed if len(body) == 0 else b"", head, PROTOBUF)
        elif method == "GetParticipant":
            asked = RoomParticipantIdentity.FromString(body)
            if asked.identity not in sfu.rooms[asked.room]:
                self.answer(_NOT_FOUND, head, status=b"404 Not Found")
                return
            self.answer(sfu.rooms[asked.room][asked.identity].SerializeToString(), head, PROTOBUF)
        elif method == "UpdateParticipant":
            update = UpdateParticipantRequest.FromString(body)
            if update.identity not in sfu.rooms[update.room]:
                self.answer(_NOT_FOUND, head, status=b"404 Not Found")
                return
            self.world.updated_at.append(time.monotonic())
            self.answer(sfu.permit(update.room, update.identity, update.permission), head, PROTOBUF)
        else:
            self.answer(json.dumps({"code": "bad_route", "msg": method}).encode(), head, status=b"404 Not Found")


class Synapse(Http):
    """The admin API's room state, and the little else that is asked."""

    name = "synapse"

    def asked(self, target: str, head: bytes, body: bytes) -> None:
        scene = self.world.scene
        if scene.hang:
            return
        path, _, query = target.partition("?")
        asked = parse_qs(query)
        if path.startswith("/_synapse/admin/v1/rooms/"):
            if b"bearer " + MATRIX_TOKEN.encode() not in head:
                self.answer(b"{}", head, status=b"401 Unauthorized")
                return
            room = unquote(path.split("/")[5])
            if path.endswith("/members"):
                event = self.world.event
                self.answer(room_members(scene, room) if event is None else event.members(), head)
                return
            self.answer(cached_state(scene, room, asked["type"][0] if "type" in asked else None), head)
        elif path.endswith("/joined_rooms"):
            self.answer(joined_rooms(unquote(path.split("/")[5])), head)
        elif path == "/_synapse/admin/v1/rooms":
            self.answer(json.dumps({"rooms": [{"room_id": room_id(n)} for n in range(scene.rooms)]}).encode(), head)
        elif path.endswith("/whoami"):
            self.answer(json.dumps({"user_id": f"@admin:{SERVER_NAME}"}).encode(), head)
        elif path.endswith("/openid/userinfo"):
            self.answer(json.dumps({"sub": asked["access_token"][0]}).encode(), head)
        else:
            self.answer(b"{}", head, status=b"404 Not Found")


async def serve() -> None:
    world = World()
    loop = asyncio.get_running_loop()
    ports = {}
    for kind in (Upstream, Livekit, Synapse):
        server = await loop.create_server(lambda kind=kind: kind(world), "127.0.0.1", 0, backlog=8192)  # type: ignore[misc]
        ports[kind.name] = server.sockets[0].getsockname()[1]
    commands = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    _say(ports)
    while line := await commands.readline():
        changes = json.loads(line)
        identity = changes.pop("participant", None)
        world.change(changes)
        told: dict[str, Any] = {"calls": world.calls, "bytes": world.bytes, "updated_at": world.updated_at}
        if identity is not None:
            told["participant"] = MessageToDict(world.sfu.rooms[identity[0]][identity[1]])
        _say(told)


def _say(line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve())
