# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check`` asks LiveKit: does it answer, does it accept our key, may we list rooms and participants?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from uuid import uuid4

from google.protobuf.message import DecodeError, Message
from livekit.protocol.room import (
    DeleteRoomRequest,
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsRequest,
    ListRoomsResponse,
)

from lotusguard.check.asking import NoAnswer, Service
from lotusguard.check.report import Findings
from lotusguard.clients.http import Answer
from lotusguard.config import Settings
from lotusguard.rules.jwt import SfuKey

M = TypeVar("M", bound=Message)

SHORTEST_SECRET = 32
SAME_KEY = (
    "give LIVEKIT_KEY and LIVEKIT_SECRET the values that livekit.yaml has under `keys:`, as lk-jwt-service has them"
)


class LiveKitCheck:
    """Asks LiveKit. :param now: seconds since the epoch."""

    def __init__(self, settings: Settings, livekit: Service, findings: Findings, now: Callable[[], float]) -> None:
        self._settings = settings
        self._livekit = livekit
        self._say = findings
        self._now = now

    async def run(self) -> None:
        """Problems become findings, not exceptions."""
        try:
            key = self._key()
            if await self._is_there() and key is not None and await self._takes(key):
                await self._shows_participants(key)
        except NoAnswer as why:
            self._say.wrong("reachable", str(why), why.remedy)

    def _key(self) -> SfuKey | None:
        settings, key = self._settings, self._settings.sfu_key
        if key is None:
            missing = [
                name
                for name, value in (
                    ("LIVEKIT_KEY", settings.livekit_key),
                    ("LIVEKIT_SECRET", settings.livekit_secret.get_secret_value()),
                )
                if not value
            ]
            reason = f"{' and '.join(missing)} not set: neither limits nor permissions are enforced"
            self._say.wrong("key", reason, SAME_KEY)
        elif len(key.secret) < SHORTEST_SECRET:
            self._say.warning(
                "secret",
                f"{len(key.secret)} characters: anybody who has a token can guess it offline",
                f"use {SHORTEST_SECRET} or more, at LiveKit, lk-jwt-service and here: openssl rand -hex 32",
            )
        return key

    async def _is_there(self) -> bool:
        base = self._settings.livekit_api
        answer = await self._livekit.ask("POST", _target("ListRooms"), b"", _headers(None))
        # RoomService refuses a call without a token; other services do not have this path.
        if answer.code == 401:
            self._say.fine("reachable", base)
            return True
        self._say.wrong(
            "reachable",
            f"{base} answers, but not as LiveKit ({answer.code} to its RoomService)",
            "correct LIVEKIT_API: LiveKit's HTTP port, usually http://127.0.0.1:7880",
        )
        return False

    async def _takes(self, key: SfuKey) -> bool:
        answer = await self._ask(key, "ListRooms", ListRoomsRequest(names=["-"]))
        if answer.code == 401:
            self._say.wrong("key", *_refusal(answer, key))
            return False
        if _read(answer, ListRoomsResponse) is None:
            self._say.wrong("key", f"LiveKit answers {answer.code} to ListRooms", "see LiveKit's log")
            return False
        self._say.fine("key", f"{key.key}, accepted by LiveKit")
        return True

    async def _shows_participants(self, key: SfuKey) -> None:
        alias = f"lotusguard-check-{uuid4().hex}"
        answer = await self._ask(key, "ListParticipants", ListParticipantsRequest(room=alias), alias)
        if _read(answer, ListParticipantsResponse) is None:
            self._say.wrong(
                "grants",
                f"LiveKit answers {answer.code} to ListParticipants",
                "see LiveKit's log: participants cannot be counted",
            )
        else:
            self._say.fine("grants", "rooms and participants can be listed")

    async def has_room(self, alias: str) -> bool | None:
        """Whether LiveKit has a room; None if it does not answer."""
        key = self._settings.sfu_key
        if key is None:
            return None
        listed = _read(await self._ask(key, "ListRooms", ListRoomsRequest(names=[alias])), ListRoomsResponse)
        return None if listed is None else bool(listed.rooms)

    async def delete_room(self, alias: str) -> bool:
        """Delete the room that the trial created. :return: whether it is gone."""
        key = self._settings.sfu_key
        assert key is not None
        now = int(self._now())
        token = key.sign({"iss": key.key, "nbf": now - 30, "exp": now + 60, "video": {"roomCreate": True}})
        request = DeleteRoomRequest(room=alias).SerializeToString()
        answer = await self._livekit.ask("POST", _target("DeleteRoom"), request, _headers(token))
        return answer.code in (200, 404)

    async def _ask(self, key: SfuKey, method: str, request: Message, alias: str | None = None) -> Answer:
        token = key.room_service_token(self._now(), room=alias)
        return await self._livekit.ask("POST", _target(method), request.SerializeToString(), _headers(token))


def _target(method: str) -> str:
    return f"/twirp/livekit.RoomService/{method}"


def _headers(token: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/protobuf"}
    return headers if token is None else headers | {"Authorization": f"Bearer {token}"}


def _read(answer: Answer, kind: type[M]) -> M | None:
    content_type = answer.header(b"content-type")
    if answer.code != 200 or b"protobuf" not in content_type:
        return None
    try:
        return kind.FromString(answer.body)
    except DecodeError:
        return None


def _refusal(answer: Answer, key: SfuKey) -> tuple[str, str]:
    """Reason and remedy of a 401. LiveKit's own text is not repeated: it may contain the token."""
    text = answer.body.decode("utf-8", "replace").lower()
    if "api key" in text:
        return f"LiveKit does not know the API key {key.key!r}", SAME_KEY
    if "expired" in text or "not valid yet" in text or "(nbf)" in text or "(exp)" in text:
        return "LiveKit considers our tokens expired or not valid yet: its clock and ours differ", "run NTP on both"
    if "permissions denied" in text:
        return f"the API key {key.key!r} may not list rooms", "see LiveKit's log"
    return f"LiveKit knows the API key {key.key!r}, but LIVEKIT_SECRET is not its secret", SAME_KEY
