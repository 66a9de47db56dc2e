# SPDX-License-Identifier: Apache-2.0
"""LiveKit's RoomService over Twirp. Floor: clients.

Protobuf on the wire: a JSON request with a name the SFU does not know is read as *nothing*, and nothing means all.
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

from lotusguard.clients.dependency import Dependency
from lotusguard.clients.http import Answer, json_object
from lotusguard.rules.tokens import SfuKey

M = TypeVar("M", bound=Message)


class NoSuchParticipant(Exception):
    """The SFU does not know the participant."""


class NodeGone(NoSuchParticipant):
    """The node that holds the participant does not answer. They may be gone with it, or be back in a moment."""


_PARTICIPANT_GONE = {"not_found": NoSuchParticipant, "deadline_exceeded": NodeGone, "unavailable": NodeGone}
_GONE_STATUSES = (404, 408, 503)
"""Those of Twirp's errors above. A 404 that does not say not_found is a proxy's, or a wrong address, and tells nothing
of participants."""
_NO_SUCH_ROOM = {"not_found": NoSuchParticipant}
"""LiveKit answers an empty list; whoever answers not_found means the same."""


@define(eq=False)
class LiveKitClient:
    """What the guard asks of LiveKit. Every method raises `DependencyFailed` when there is no usable answer.

    :param key: signs the tokens that RoomService wants.
    """

    _dependency: Dependency
    _key: SfuKey
    _wall: Callable[[], float] = time.time

    def __attrs_post_init__(self) -> None:
        self._dependency.probe = self.probe

    @property
    def clock_skew(self) -> float | None:
        """Seconds by which LiveKit's clock is ahead of ours; ``None`` while unknown."""
        return self._dependency.skew

    @property
    def available(self) -> bool:
        """Whether its circuit is closed."""
        return not self._dependency.breaker.open

    async def list_rooms(self, names: Iterable[str] = ()) -> Sequence[Room]:
        """The rooms there are, or those of them that are named. ``num_participants`` lags by seconds."""
        request = ListRoomsRequest(names=names)
        return (await self._ask("ListRooms", request, ListRoomsResponse)).rooms

    async def list_participants(self, alias: str, turn: str = "") -> Sequence[ParticipantInfo]:
        """The participants of an SFU room; none if there is no such room.

        :param turn: for whom we ask; see `Dependency.call`.
        """
        request = ListParticipantsRequest(room=alias)
        try:
            found = await self._ask_of("ListParticipants", request, ListParticipantsResponse, alias, _NO_SUCH_ROOM, turn)
        except NoSuchParticipant:
            return ()
        return found.participants

    async def get_participant(self, alias: str, identity: str) -> ParticipantInfo:
        """:raises NoSuchParticipant:"""
        request = RoomParticipantIdentity(room=alias, identity=identity)
        return await self._ask_of("GetParticipant", request, ParticipantInfo, alias)

    async def update_permission(self, alias: str, identity: str, permission: ParticipantPermission) -> ParticipantInfo:
        """Replace a participant's whole permission. Sources that go are unpublished by the SFU.

        :return: the participant as it is afterwards. :raises NoSuchParticipant:
        """
        request = UpdateParticipantRequest(room=alias, identity=identity, permission=permission)
        return await self._ask_of("UpdateParticipant", request, ParticipantInfo, alias)

    async def mute_track(self, alias: str, identity: str, track_sid: str) -> None:
        """Mute a published track. :raises NoSuchParticipant:"""
        request = MuteRoomTrackRequest(room=alias, identity=identity, track_sid=track_sid, muted=True)
        await self._ask_of("MutePublishedTrack", request, MuteRoomTrackResponse, alias)

    async def remove_participant(self, alias: str, identity: str) -> None:
        """Disconnect a participant. Their token stays valid. :raises NoSuchParticipant:"""
        request = RoomParticipantIdentity(room=alias, identity=identity)
        await self._ask_of("RemoveParticipant", request, RemoveParticipantResponse, alias)

    async def probe(self) -> None:
        """The cheapest question that shows whether it answers and takes our key."""
        path, headers = self._request("ListRooms", None)
        body = ListRoomsRequest(names=["-"]).SerializeToString()
        await self._dependency.call(
            b"POST", path, headers, body, read=partial(_message, kind=ListRoomsResponse), is_probe=True
        )

    def _request(self, method: str, alias: str | None) -> tuple[bytes, Headers]:
        token = self._key.room_service_token(self._wall(), room=alias)
        headers = Headers(
            {b"Content-Type": [b"application/protobuf"], b"Authorization": [b"Bearer " + token.encode("ascii")]}
        )
        return b"/twirp/livekit.RoomService/" + method.encode("ascii"), headers

    async def _ask(self, method: str, request: Message, response: type[M], alias: str | None = None) -> M:
        path, headers = self._request(method, alias)
        return await self._dependency.call(
            b"POST", path, headers, request.SerializeToString(), read=partial(_message, kind=response)
        )

    async def _ask_of(
        self,
        method: str,
        request: Message,
        response: type[M],
        alias: str,
        gone: Mapping[str, type[NoSuchParticipant]] = MappingProxyType(_PARTICIPANT_GONE),
        turn: str = "",
    ) -> M:
        """Ask something of one participant, whose node may be gone: that is no illness of the SFU."""
        path, headers = self._request(method, alias)

        def read(answer: Answer) -> M | type[NoSuchParticipant]:
            if answer.code in _GONE_STATUSES:
                return gone[json_object(answer)["code"]]
            return _message(answer, response)

        body = request.SerializeToString()
        found = await self._dependency.call(b"POST", path, headers, body, read=read, expected=_GONE_STATUSES, turn=turn or alias)
        if isinstance(found, type):
            raise found
        return found


def _message(answer: Answer, kind: type[M]) -> M:
    if answer.code != 200:
        raise ValueError(answer.code)
    content_type = (answer.headers.getRawHeaders(b"content-type") or [b""])[0].lower()
    if b"json" in content_type or b"text" in content_type:
        raise ValueError("no protobuf")
    message = kind.FromString(answer.body)
    if answer.body and not message.ListFields():
        raise ValueError("nothing in it is what was asked for")
    return message
