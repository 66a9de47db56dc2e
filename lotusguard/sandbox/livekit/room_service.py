# SPDX-License-Identifier: Apache-2.0
"""LiveKit's RoomService: the checks, the effect and the answer of each method. Sandbox.

Read from LiveKit 1.13's ``pkg/service/roomservice.go`` and ``roommanager.go``.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from livekit.protocol import room as pb
from livekit.protocol.models import DisconnectReason, ParticipantInfo, Room

from lotusguard.sandbox.livekit import twirp
from lotusguard.sandbox.livekit.changes import Change
from lotusguard.sandbox.livekit.grants import VideoGrant
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.livekit.sfu import Sfu

_NO_PARTICIPANT = ("not_found", "twirp error unknown: participant does not exist")
_NO_ROOM = ("not_found", "requested room does not exist")
_NO_NODE = ("unavailable", "no response from servers")


class RoomService:
    """The methods of ``twirp.REQUESTS`` over the rooms of ``sfu``."""

    def __init__(self, sfu: Sfu) -> None:
        self._sfu = sfu

    def call(self, method: str, request: Any, grant: VideoGrant | None) -> Message:
        """Carry out a method.

        :param grant: the caller's grant; ``None`` if the request carries no token.
        :raises Refusal: with a Twirp error.
        """
        if not self._may(method, request, grant or VideoGrant()):
            raise twirp.error("unauthenticated", "permissions denied")
        answered: Message = getattr(self, f"_{method}")(request)
        return answered

    def _may(self, method: str, request: Any, grant: VideoGrant) -> bool:
        if method in ("CreateRoom", "DeleteRoom"):
            return grant.room_create
        if method == "ListRooms":
            return grant.room_list
        return grant.room_admin and grant.room == request.room

    def _CreateRoom(self, request: pb.CreateRoomRequest) -> Room:
        room = self._sfu.open_room(request.name)
        for setting in ("empty_timeout", "departure_timeout", "max_participants", "metadata"):
            # A zero does not change the setting of an open room.
            if getattr(request, setting):
                setattr(room.settings, setting, getattr(request, setting))
                setattr(room.listed, setting, getattr(request, setting))
        return room.listed

    def _ListRooms(self, request: pb.ListRoomsRequest) -> pb.ListRoomsResponse:
        wanted = set(request.names)
        return pb.ListRoomsResponse(
            rooms=[room.listed for name, room in self._sfu.rooms.items() if not wanted or name in wanted]
        )

    def _DeleteRoom(self, request: pb.DeleteRoomRequest) -> pb.DeleteRoomResponse:
        room = self._sfu.rooms.get(request.room)
        if room is None:
            raise twirp.error(*_NO_ROOM)
        room.close(DisconnectReason.ROOM_DELETED)
        return pb.DeleteRoomResponse()

    def _ListParticipants(self, request: pb.ListParticipantsRequest) -> pb.ListParticipantsResponse:
        room = self._sfu.rooms.get(request.room)
        # LiveKit iterates over a map. Reversing makes sure that nobody relies on the order of joining.
        present = [] if room is None else [who.info() for who in reversed(room.participants.values())]
        stale = [info for (alias, _), (info, _status) in self._sfu.stale.items() if alias == request.room]
        return pb.ListParticipantsResponse(participants=present + stale)

    def _GetParticipant(self, request: pb.RoomParticipantIdentity) -> ParticipantInfo:
        stale = self._sfu.stale.get((request.room, request.identity))
        if stale is not None:
            return stale[0]
        participant = self._sfu.participant(request.room, request.identity)
        if participant is None:
            raise twirp.error(*_NO_PARTICIPANT)
        return participant.info()

    def _RemoveParticipant(self, request: pb.RoomParticipantIdentity) -> pb.RemoveParticipantResponse:
        participant = self._served(request)
        participant.room.remove(participant, DisconnectReason.PARTICIPANT_REMOVED)
        self._log("RemoveParticipant", request, participant)
        return pb.RemoveParticipantResponse()

    def _MutePublishedTrack(self, request: pb.MuteRoomTrackRequest) -> pb.MuteRoomTrackResponse:
        participant = self._sfu.participant(request.room, request.identity)
        if participant is None:
            # Unlike the others, this method does not check first whether a node serves the participant.
            raise twirp.error(*_NO_NODE)
        if not request.muted and not self._sfu.remote_unmute:
            raise twirp.error("failed_precondition", "remote unmute not enabled")
        track = participant.set_muted(request.track_sid, request.muted)
        self._log("MutePublishedTrack", request, participant)
        return pb.MuteRoomTrackResponse(track=track)

    def _UpdateParticipant(self, request: pb.UpdateParticipantRequest) -> ParticipantInfo:
        participant = self._served(request)
        if self._sfu.deaf:
            return participant.info()
        before = participant.grant.to_permission()
        participant.name = request.name or participant.name
        participant.metadata = request.metadata or participant.metadata
        for key, value in request.attributes.items():
            participant.attributes[key] = value
            if not value:
                del participant.attributes[key]
        if request.HasField("permission"):
            participant.set_permission(request.permission)
        self._log("UpdateParticipant", request, participant, before)
        return participant.info()

    def _served(self, request: Any) -> Participant:
        """The participant, if a node serves it. :raises Refusal: for stale entries and unknown participants."""
        stale = self._sfu.stale.get((request.room, request.identity))
        if stale is not None:
            raise twirp.error(*(_NO_NODE if stale[1] == 503 else _NO_PARTICIPANT))
        participant = self._sfu.participant(request.room, request.identity)
        if participant is None:
            raise twirp.error(*_NO_PARTICIPANT)
        return participant

    def _log(self, method: str, request: Any, participant: Participant, before: Any = None) -> None:
        after = None if before is None else participant.grant.to_permission()
        self._sfu.update_log.append(Change(method, request.room, request.identity, request, before, after))
