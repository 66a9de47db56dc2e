# SPDX-License-Identifier: Apache-2.0
"""A participant of an SFU room: its permission and its tracks. Sandbox.

Read from LiveKit 1.13's ``pkg/rtc/participant.go``.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from livekit.protocol.models import (
    DisconnectReason,
    ParticipantInfo,
    ParticipantPermission,
    TrackInfo,
    TrackSource,
    TrackType,
)

from lotusguard.sandbox.livekit.grants import VideoGrant, source_number
from lotusguard.sandbox.livekit.tokens import Claims

_DEPENDENT = (ParticipantInfo.Kind.EGRESS, ParticipantInfo.Kind.AGENT)
_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


REFRESHED_TOKEN_LIFETIME = 600
"""Seconds (``tokenDefaultTTL``)."""


class JoinRefused(Exception):
    """The SFU refuses a client, with this status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.status = status


def guid(prefix: str) -> str:
    """An ID in LiveKit's format."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(12))


class Room(Protocol):
    """What a participant needs of its room."""

    name: str

    def tell(self, event: str, participant: Participant | None = None, track: TrackInfo | None = None) -> None:
        """Emit a webhook event."""

    def remove(self, participant: Participant, reason: int) -> None:
        """End a session."""

    def close(self) -> None:
        """Remove everybody and close the room."""

    def refresh_listed(self) -> None:
        """Update the counts that ListRooms shows."""

    def sign(self, claims: Mapping[str, Any], valid_for: float) -> str:
        """A token of the SFU."""


class Participant:
    """One session in a room.

    :ivar grant: the grant now.
    :ivar granted: the grant of the token that the session began with.
    :ivar state: JOINING, JOINED, ACTIVE or DISCONNECTED.
    :ivar tracks: the published tracks, by track sid.
    :ivar disconnect_reason: why the session ended.
    """

    def __init__(self, room: Room, identity: str, claims: Claims, grant: VideoGrant, now: float) -> None:
        self.room = room
        self.identity = identity
        self.sid = guid("PA_")
        self.grant = grant
        self.granted = grant
        self.name = claims.name
        self.metadata = claims.metadata
        self.attributes = dict(claims.attributes)
        kinds = dict(ParticipantInfo.Kind.items())
        self.kind: int = kinds.get(claims.kind.upper(), ParticipantInfo.Kind.STANDARD)
        self.state: int = ParticipantInfo.State.JOINING
        self.tracks: dict[str, TrackInfo] = {}
        self.joined_at = now
        self.disconnect_reason: int = DisconnectReason.UNKNOWN_REASON
        self.is_publisher = False
        self._was_active = False

    @property
    def connected(self) -> bool:
        return self.state != ParticipantInfo.State.DISCONNECTED

    @property
    def dependent(self) -> bool:
        """Whether it is a recorder or agent: these are not counted and do not keep the room open."""
        return self.kind in _DEPENDENT or self.grant.recorder or self.grant.agent

    @property
    def ever_active(self) -> bool:
        return self._was_active

    def info(self) -> ParticipantInfo:
        """As RoomService and webhooks show it."""
        return ParticipantInfo(
            sid=self.sid,
            identity=self.identity,
            name=self.name,
            metadata=self.metadata,
            attributes=self.attributes,
            state=self.state,  # type: ignore[arg-type]
            kind=self.kind,  # type: ignore[arg-type]
            permission=self.grant.to_permission(),
            tracks=list(self.tracks.values()),
            joined_at=int(self.joined_at),
            joined_at_ms=int(self.joined_at * 1000),
            is_publisher=self.is_publisher,
            disconnect_reason=self.disconnect_reason,  # type: ignore[arg-type]
        )

    def activate(self) -> None:
        """The media connection is established; ``participant_joined`` is sent."""
        if self.connected and not self._was_active:
            self.state = ParticipantInfo.State.ACTIVE
            self._was_active = True
            self.room.tell("participant_joined", self)

    def publish(self, source: int | str, type: int | str | None = None, *, mime_type: str = "") -> TrackInfo | None:
        """Ask to publish a track.

        :param source: the label that the client chooses. Nothing checks it against the media.
        :param type: AUDIO or VIDEO; by default the usual one for the source.
        :return: the track, or ``None`` if the SFU refuses it.
        """
        number = source_number(source)
        if not self.connected or not self.grant.may_publish(number):
            return None
        if type is None:
            video = number in (TrackSource.CAMERA, TrackSource.SCREEN_SHARE)
            type = TrackType.VIDEO if video else TrackType.AUDIO
        kind = TrackType.Value(type.upper()) if isinstance(type, str) else int(type)
        track = TrackInfo(
            sid=guid("TR_"),
            source=number,  # type: ignore[arg-type]
            type=kind,  # type: ignore[arg-type]
            mime_type=mime_type or ("video/VP8" if kind == TrackType.VIDEO else "audio/red"),
        )
        self.tracks[track.sid] = track
        self.is_publisher = True
        self.room.tell("track_published", self, track)
        return track

    def unpublish(self, track_sid: str) -> None:
        """Remove a track, if it exists."""
        track = self.tracks.pop(track_sid, None)
        if track is not None:
            self.room.tell("track_unpublished", self, track)

    def set_muted(self, track_sid: str, muted: bool) -> TrackInfo | None:
        """Mute or unmute a track; ``None`` if there is no such track."""
        track = self.tracks.get(track_sid)
        if track is not None:
            track.muted = muted
        return track

    def set_permission(self, permission: ParticipantPermission) -> None:
        """Replace the whole permission and unpublish the tracks it no longer covers (``SetPermission``)."""
        if self.grant.to_permission() == permission:
            return
        self.grant = self.grant.replaced_by(permission)
        for track in list(self.tracks.values()):
            if not self.grant.may_publish(track.source):
                self.unpublish(track.sid)
        self.is_publisher = self.is_publisher and self.grant.can_publish is not False

    def refreshed_token(self) -> str:
        """The token that LiveKit sends to a connected client after connecting and every few minutes.

        It carries the current grant and is valid for ten minutes (``RoomManager.refreshToken``).
        """
        claims: dict[str, Any] = {"sub": self.identity, "identity": self.identity, "video": self.grant.to_claim()}
        optional = {"name": self.name, "metadata": self.metadata, "attributes": copy.copy(self.attributes)}
        claims |= {name: value for name, value in optional.items() if value}
        return self.room.sign(claims, REFRESHED_TOKEN_LIFETIME)
