# SPDX-License-Identifier: Apache-2.0
"""LiveKit's RoomService over Twirp.

Requests are protobuf: in a JSON request, LiveKit drops an unknown enum name without an error, and an empty list of
sources means all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from attrs import define
from google.protobuf.message import Message
from livekit.protocol.models import ParticipantInfo, ParticipantPermission, Room
from livekit.protocol.room import (
    CreateRoomRequest,
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsRequest,
    ListRoomsResponse,
    MuteRoomTrackRequest,
    MuteRoomTrackResponse,
    RemoveParticipantResponse,
    RoomParticipantIdentity,
    UpdateParticipantRequest,
)
from twisted.web.http_headers import Headers

from lotusguard.clients.dependency_client import DependencyClient
from lotusguard.clients.http import Answer, json_object
from lotusguard.rules.jwt import SfuKey

M = TypeVar("M", bound=Message)


class NoSuchParticipant(Exception):
    """The SFU does not know the participant."""


class NodeGone(NoSuchParticipant):
    """The node of the participant does not answer. They may have left with it, or return in a moment."""


_PARTICIPANT_GONE = {"not_found": NoSuchParticipant, "deadline_exceeded": NodeGone, "unavailable": NodeGone}
_GONE_STATUSES = (404, 408, 503)
"""The statuses of those Twirp errors. A 404 without ``not_found`` comes from a proxy or a wrong address; it tells
nothing about a participant."""
_NO_SUCH_ROOM = {"not_found": NoSuchParticipant}
"""LiveKit answers with an empty list; ``not_found`` means the same."""


@define(eq=False)
class LiveKitClient(DependencyClient):
    """The requests of the guard to LiveKit. Every method raises `DependencyFailed` if there is no usable answer.

    Calls for different rooms take turns. ``turn`` names the Matrix room, so that its slots share one turn; by default
    it is the alias.

    :param key: signs the tokens that RoomService requires.
    :param wall: seconds since the epoch, for those tokens.
    """

    key: SfuKey
    _wall: Callable[[], float] = time.time

    def __attrs_post_init__(self) -> None:
        self._dependency.probe = self.probe

    def now(self) -> float:
        """Seconds since the epoch by LiveKit's clock, as its answers showed it: it judges tokens by that."""
        return self._wall() + (self._dependency.skew or 0.0)

    async def list_rooms(self, names: Iterable[str] = ()) -> Sequence[Room]:
        """The SFU rooms, or those of them that are named. ``num_participants`` lags by seconds."""
        request = ListRoomsRequest(names=names)
        return (await self._ask("ListRooms", request, ListRoomsResponse)).rooms

    async def create_room(self, alias: str, empty_timeout: int) -> None:
        """Create a room, if there is none of this name.

        :param empty_timeout: seconds after which it is closed if nobody joins.
        """
        await self._ask("CreateRoom", CreateRoomRequest(name=alias, empty_timeout=empty_timeout), Room)

    async def list_participants(self, alias: str, *, turn: str = "") -> Sequence[ParticipantInfo]:
        """The participants of a room; none if there is no such room."""
        request = ListParticipantsRequest(room=alias)
        try:
            found = await self._ask_of(
                "ListParticipants", request, ListParticipantsResponse, alias, turn, _NO_SUCH_ROOM
            )
        except NoSuchParticipant:
            return ()
        return found.participants

    async def get_participant(self, alias: str, identity: str, *, turn: str = "") -> ParticipantInfo:
        """:raises NoSuchParticipant:"""
        request = RoomParticipantIdentity(room=alias, identity=identity)
        return await self._ask_of("GetParticipant", request, ParticipantInfo, alias, turn)

    async def update_permission(
        self, alias: str, identity: str, permission: ParticipantPermission, *, turn: str = ""
    ) -> ParticipantInfo:
        """Replace a participant's whole permission. LiveKit unpublishes tracks of sources that are revoked.

        :return: the participant with the new permission. :raises NoSuchParticipant:
        """
        request = UpdateParticipantRequest(room=alias, identity=identity, permission=permission)
        return await self._ask_of("UpdateParticipant", request, ParticipantInfo, alias, turn)

    async def mute_track(self, alias: str, identity: str, track_sid: str, *, turn: str = "") -> None:
        """Mute a published track. :raises NoSuchParticipant:"""
        request = MuteRoomTrackRequest(room=alias, identity=identity, track_sid=track_sid, muted=True)
        await self._ask_of("MutePublishedTrack", request, MuteRoomTrackResponse, alias, turn)

    async def remove_participant(self, alias: str, identity: str, *, turn: str = "") -> None:
        """Disconnect a participant. Their token remains valid. :raises NoSuchParticipant:"""
        request = RoomParticipantIdentity(room=alias, identity=identity)
        await self._ask_of("RemoveParticipant", request, RemoveParticipantResponse, alias, turn)

    async def probe(self) -> None:
        """The cheapest call that shows whether it answers and accepts our key."""
        path, headers = self._request("ListRooms", None)
        body = ListRoomsRequest(names=["-"]).SerializeToString()
        await self._dependency.call(
            b"POST", path, headers, body, read=partial(_message, kind=ListRoomsResponse), is_probe=True
        )

    def _request(self, method: str, alias: str | None) -> tuple[bytes, Headers]:
        token = self.key.room_service_token(self.now(), room=alias, create=method == "CreateRoom")
        headers = Headers(
            {b"Content-Type": [b"application/protobuf"], b"Authorization": [b"Bearer " + token.encode("ascii")]}
        )
        return b"/twirp/livekit.RoomService/" + method.encode("ascii"), headers

    async def _ask(self, method: str, request: Message, response: type[M], alias: str | None = None) -> M:
        path, headers = self._request(method, alias)
        return await self._dependency.call(
            b"POST", path, headers, request.SerializeToString(), read=partial(_message, kind=response), turn=method
        )

    async def _ask_of(
        self,
        method: str,
        request: Message,
        response: type[M],
        alias: str,
        turn: str = "",
        gone: Mapping[str, type[NoSuchParticipant]] = MappingProxyType(_PARTICIPANT_GONE),
    ) -> M:
        """Make a call about one participant or room. That its node is gone is not a failure of LiveKit."""
        path, headers = self._request(method, alias)

        def read(answer: Answer) -> M | type[NoSuchParticipant]:
            if answer.code in _GONE_STATUSES:
                return gone[json_object(answer)["code"]]
            return _message(answer, response)

        body = request.SerializeToString()
        found = await self._dependency.call(
            b"POST", path, headers, body, read=read, expected=_GONE_STATUSES, turn=turn or alias
        )
        if isinstance(found, type):
            raise found
        return found


def _message(answer: Answer, kind: type[M]) -> M:
    if answer.code != 200:
        raise ValueError(answer.code)
    content_type = answer.header(b"content-type").lower()
    if b"json" in content_type or b"text" in content_type:
        raise ValueError("not protobuf")
    message = kind.FromString(answer.body)
    if answer.body and not message.ListFields():
        raise ValueError("not the expected message")
    return message
