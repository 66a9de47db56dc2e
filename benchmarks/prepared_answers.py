# SPDX-License-Identifier: Apache-2.0
"""The answers of the fast stand-ins: rooms, policies, participants, tokens. No sockets.

Simpler than the sandbox and far cheaper: most answers are made once and sent many times.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from functools import lru_cache
from typing import Any

from attrs import Factory, define
from google.protobuf.json_format import MessageToDict
from livekit.protocol.models import ParticipantInfo, ParticipantPermission, TrackInfo, TrackSource, TrackType
from livekit.protocol.room import ListParticipantsResponse, ListRoomsResponse

from lotusguard.rules.identity import room_alias
from lotusguard.rules.state import ROOM_QUALITY, VOICE_LIMIT

KEY, SECRET = "benchkey", "a-secret-for-benchmarks-and-nothing-else"
MATRIX_TOKEN = "bench-admin"
SERVER_NAME = "bench.local"
DEVICE = "PHONE"
USERS_A_ROOM = 20
NEW_USERS = 10
"""How many of a room's users are not in the call yet."""
BIG_ROOM = "!big"
"""Rooms whose ID begins like this have `Scene.big_members` members."""

cached_alias = lru_cache(maxsize=100_000)(room_alias)


def room_id(number: int) -> str:
    return f"!room{number}:{SERVER_NAME}"


def user_id(number: int) -> str:
    return f"@user{number}:{SERVER_NAME}"


@lru_cache(maxsize=1000)
def _members_of(number: int, people: int) -> bytes:
    users = [user_id(number * USERS_A_ROOM + user) for user in range(people)]
    return json.dumps({"members": users, "total": len(users)}).encode()


def room_members(scene: Scene, room: str) -> bytes:
    """The admin API's list of a room's members: everybody who is in its call."""
    return _members_of(int(room.removeprefix("!room").partition(":")[0]), scene.participants)


def stranger_id(number: int, room: int) -> str:
    """A user who makes one request: a member of the one room that the name tells."""
    return f"@new{number}-{room}:{SERVER_NAME}"


@lru_cache(maxsize=100_000)
def joined_rooms(user: str) -> bytes:
    """The admin API's answer about the rooms of a user: those that this user joins in the scenarios."""
    if user.startswith("@new"):
        return json.dumps(
            {"joined_rooms": [room_id(int(user.partition("-")[2].partition(":")[0]))], "total": 1}
        ).encode()
    number = int(user.removeprefix("@user").partition(":")[0])
    rooms = {number // USERS_A_ROOM, (number - NEW_USERS) // USERS_A_ROOM}
    names = [f"{prefix}{room}:{SERVER_NAME}" for room in sorted(rooms) for prefix in ("!room", BIG_ROOM)]
    return json.dumps({"joined_rooms": names, "total": len(names)}).encode()


@define
class Scene:
    """How the dependencies behave; can be changed while they run.

    :ivar rooms: rooms with a call, of `participants` people each.
    :ivar cap: every room's ``max_users``. :ivar forbid: the ``false`` keys of every room's ``io.lotus.room_quality``.
    :ivar upstream_delay: seconds until upstream answers. :ivar hang: whether SFU and homeserver answer nothing.
    :ivar honour_type: whether the homeserver honours ``?type=`` as newer ones do.
    """

    rooms: int = 50
    participants: int = 20
    cap: int = 50
    forbid: tuple[str, ...] = ("allow_screenshare",)
    upstream_delay: float = 0.0
    hang: bool = False
    honour_type: bool = True
    members: int = 30
    big_members: int = 10_000


def _segment(content: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(content, separators=(",", ":")).encode()).rstrip(b"=")


_JWT_HEAD = _segment({"alg": "HS256", "typ": "JWT"})


def issued_token(room: str, user: str, device: str) -> bytes:
    """A join token as lk-jwt-service makes it, properly signed."""
    now = int(time.time())
    video = {"room": cached_alias(room), "roomJoin": True, "canPublish": True, "canSubscribe": True}
    claims = {"exp": now + 3600, "iss": KEY, "nbf": now, "sub": f"{user}:{device}", "video": video}
    signed = _JWT_HEAD + b"." + _segment(claims)
    signature = hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()
    return signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")


def token_answer(body: bytes) -> bytes:
    """Upstream's answer to a ``/sfu/get`` body; the OpenID token is the user's ID."""
    asked = json.loads(body)
    token = issued_token(asked["room"], asked["openid_token"]["access_token"], asked["device_id"])
    return b'{"url":"ws://127.0.0.1:7880","jwt":"' + token + b'"}\n'


_SOURCES = (TrackSource.CAMERA, TrackSource.MICROPHONE, TrackSource.SCREEN_SHARE, TrackSource.SCREEN_SHARE_AUDIO)
_CLAIMS = {"allow_camera": (TrackSource.CAMERA,), "allow_screenshare": _SOURCES[2:]}


def participant(sid: str, identity: str, forbidden: set[Any]) -> ParticipantInfo:
    """Somebody in a call, who publishes a microphone and a camera."""
    allowed = [source for source in _SOURCES if source not in forbidden]
    permission = ParticipantPermission(
        can_subscribe=True, can_publish=True, can_publish_data=True, can_publish_sources=allowed if forbidden else []
    )
    tracks = [
        TrackInfo(sid=f"TR_A{sid}", type=TrackType.AUDIO, source=TrackSource.MICROPHONE, mime_type="audio/red"),
        TrackInfo(
            sid=f"TR_V{sid}", type=TrackType.VIDEO, source=TrackSource.CAMERA, mime_type="video/VP8", width=1280,
            height=720, simulcast=True,
        ),
    ]  # fmt: skip
    return ParticipantInfo(
        sid=sid, identity=identity, state=ParticipantInfo.State.ACTIVE,
        joined_at=1_760_000_000, permission=permission, tracks=tracks, is_publisher=True, region="bench",
    )  # fmt: skip


def _participant(room: int, number: int, forbidden: set[Any]) -> ParticipantInfo:
    return participant(f"PA_{room}x{number}", f"{user_id(room * USERS_A_ROOM + number)}:{DEVICE}", forbidden)


@define
class SfuRooms:
    """The participants of each SFU room. A room's answer is made once, and again after each change."""

    rooms: dict[str, dict[str, ParticipantInfo]]
    listed: bytes = b""
    _protobuf: dict[str, bytes] = Factory(dict)
    _json: dict[str, bytes] = Factory(dict)

    @classmethod
    def of(cls, scene: Scene) -> SfuRooms:
        forbidden = {source for key in scene.forbid for source in _CLAIMS[key]}
        rooms = {
            cached_alias(room_id(room)): {
                info.identity: info for info in (_participant(room, n, forbidden) for n in range(scene.participants))
            }
            for room in range(scene.rooms)
        }
        listed = ListRoomsResponse()
        for alias, people in rooms.items():
            listed.rooms.add(sid="RM_" + alias[:8], name=alias, num_participants=len(people), num_publishers=1)
        return cls(rooms, listed.SerializeToString())

    def participants(self, alias: str, *, as_json: bool) -> bytes:
        made = self._json if as_json else self._protobuf
        answer = made.get(alias)
        if answer is None:
            message = ListParticipantsResponse(participants=self.rooms.get(alias, {}).values())
            answer = (
                json.dumps(
                    MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
                ).encode()
                if as_json
                else message.SerializeToString()
            )
            made[alias] = answer
        return answer

    def put(self, alias: str, info: ParticipantInfo) -> None:
        """Somebody arrived."""
        self.rooms[alias][info.identity] = info
        self._forget(alias)

    def take(self, alias: str, identity: str) -> ParticipantInfo:
        """Somebody left."""
        self._forget(alias)
        return self.rooms[alias].pop(identity)

    def _forget(self, alias: str) -> None:
        self._protobuf.pop(alias, None)
        self._json.pop(alias, None)

    def permit(self, alias: str, identity: str, permission: ParticipantPermission) -> bytes:
        info = self.rooms[alias][identity]
        info.permission.CopyFrom(permission)
        self._forget(alias)
        return info.SerializeToString()


def _event(room: str, kind: str, state_key: str, content: object) -> dict[str, Any]:
    return {
        "type": kind, "room_id": room, "sender": user_id(0), "content": content, "state_key": state_key,
        "origin_server_ts": 1_760_000_000_000, "unsigned": {"age": 120_000_000},
        "event_id": "$" + cached_alias(room, kind + state_key), "user_id": user_id(0), "age": 120_000_000,
    }  # fmt: skip


def _member(room: str, number: int) -> dict[str, Any]:
    content = {"avatar_url": f"mxc://{SERVER_NAME}/{'A' * 24}", "displayname": f"User {number}", "membership": "join"}
    return _event(room, "m.room.member", user_id(number), content)


@lru_cache(maxsize=4)
def _members(count: int) -> bytes:
    """A room's member events, serialised; for speed they are the same in every room."""
    return b",".join(json.dumps(_member(room_id(0), number)).encode() for number in range(count))


def room_state(scene: Scene, room: str, kind: str | None) -> bytes:
    """The admin API's answer about a room's state, whole unless a type is asked for and honoured."""
    policy = {
        VOICE_LIMIT: {"max_users": scene.cap},
        ROOM_QUALITY: {"allow_camera": "allow_camera" not in scene.forbid,
                       "allow_screenshare": "allow_screenshare" not in scene.forbid},
    }  # fmt: skip
    if kind is not None and scene.honour_type:
        return json.dumps({"state": [_event(room, kind, "", policy[kind])] if kind in policy else []}).encode()
    own = b",".join(json.dumps(_event(room, kind, "", content)).encode() for kind, content in policy.items())
    members = _members(scene.big_members if room.startswith(BIG_ROOM) else scene.members)
    return b'{"state": [' + members + b"," + own + b"]}"


_state_cache: dict[tuple[str, str | None], bytes] = {}


def cached_state(scene: Scene, room: str, kind: str | None) -> bytes:
    """`room_state`, made once. ``cached_state_forget`` is called after each change of the scene."""
    key = (room, kind)
    if room.startswith(BIG_ROOM) and not (kind and scene.honour_type):
        return room_state(scene, room, kind)  # megabytes: not kept
    answer = _state_cache.get(key)
    if answer is None:
        answer = _state_cache[key] = room_state(scene, room, kind)
    return answer


def cached_state_forget() -> None:
    _state_cache.clear()
