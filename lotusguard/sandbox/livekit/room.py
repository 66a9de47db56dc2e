# SPDX-License-Identifier: Apache-2.0
"""A room of the stand-in SFU: its participants, its timers and its webhook events. Sandbox.

Read from LiveKit 1.13's ``pkg/rtc/room.go`` and ``pkg/telemetry/events.go``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from livekit.protocol.models import DisconnectReason, ParticipantInfo, Room, TrackInfo
from livekit.protocol.webhook import WebhookEvent

from lotusguard.sandbox.livekit.participant import Participant, guid

COUNT_LAG = 5
"""Seconds by which ``Room.num_participants`` lags (``roomUpdateInterval``)."""

Emit = Callable[[WebhookEvent], None]
Sign = Callable[[Mapping[str, Any], float], str]


class SfuRoom:
    """A room that is open on the SFU.

    :param emit: takes each webhook event.
    :param clock: for the room's timers.
    :param sign: makes a token of the SFU from claims and a lifetime in seconds.
    :ivar listed: the room as ListRooms shows it, which is a few seconds old.
    """

    def __init__(self, name: str, *, emit: Emit, clock: Any, now: Callable[[], float], sign: Sign) -> None:
        self.name = name
        self.participants: dict[str, Participant] = {}
        self.closed = False
        self.now = now
        self._emit = emit
        self._sign = sign
        self._clock = clock
        self._ever_left = False
        self._timers: dict[str, Any] = {}
        created = now()
        self.settings = Room(
            sid=guid("RM_"),
            name=name,
            empty_timeout=300,
            departure_timeout=20,
            creation_time=int(created),
            creation_time_ms=int(created * 1000),
            turn_password=secrets.token_urlsafe(12),
        )
        self.listed = Room()
        self.listed.CopyFrom(self.settings)
        self.tell("room_started")
        self._close_when_empty()

    def tell(self, event: str, participant: Participant | None = None, track: TrackInfo | None = None) -> None:
        """Emit a webhook event. Track events carry only the sid and identity of the participant."""
        told = WebhookEvent(event=event, id=guid("EV_"), created_at=int(self.now()), track=track)
        if track is None:
            told.room.CopyFrom(self.listed)
            if participant is not None:
                told.participant.CopyFrom(participant.info())
        elif participant is not None:
            told.room.CopyFrom(Room(sid=self.settings.sid, name=self.name))
            told.participant.CopyFrom(ParticipantInfo(sid=participant.sid, identity=participant.identity))
        self._emit(told)

    def has_place(self) -> bool:
        """Whether ``max_participants`` allows one more connection."""
        most = self.settings.max_participants
        return not most or sum(not p.dependent for p in self.participants.values()) < most

    def add(self, participant: Participant) -> None:
        """Add a session, in the state JOINING."""
        self.participants[participant.identity] = participant
        self._stop("close")
        self._count_later()

    def remove(self, participant: Participant, reason: int) -> None:
        """End a session: unpublish its tracks and emit participant_left.

        Sessions that never were active emit participant_connection_aborted instead.
        """
        if self.participants.get(participant.identity) is not participant:
            return
        del self.participants[participant.identity]
        for sid in list(participant.tracks):
            participant.unpublish(sid)
        participant.state = ParticipantInfo.State.DISCONNECTED
        participant.disconnect_reason = reason
        self._ever_left = True
        self._count_later()
        left = "participant_left" if participant.ever_active else "participant_connection_aborted"
        self.tell(left, participant)
        self._close_when_empty()

    def close(self, reason: int = DisconnectReason.ROOM_CLOSED) -> None:
        """Remove everybody and emit room_finished."""
        if self.closed:
            return
        self.closed = True
        for participant in list(self.participants.values()):
            self.remove(participant, reason)
        self.forget_timers()
        self.tell("room_finished")

    def forget(self, participant: Participant) -> None:
        """End a session without any event."""
        if self.participants.get(participant.identity) is participant:
            del self.participants[participant.identity]
            participant.state = ParticipantInfo.State.DISCONNECTED
            participant.tracks.clear()
            self._ever_left = True
            self._count_later()
            self._close_when_empty()

    def abandon(self) -> None:
        """End all sessions and the room without any event."""
        self.closed = True
        for participant in list(self.participants.values()):
            self.forget(participant)
        self.forget_timers()

    def sign(self, claims: Mapping[str, Any], valid_for: float) -> str:
        """A token of the SFU. :param valid_for: seconds."""
        return self._sign(claims, valid_for)

    def forget_timers(self) -> None:
        """Cancel all timers."""
        for name in list(self._timers):
            self._stop(name)

    def _count_later(self) -> None:
        if "count" not in self._timers and not self.closed:
            self._timers["count"] = self._clock.callLater(COUNT_LAG, self._count)

    def _count(self) -> None:
        self._timers.pop("count", None)
        self.refresh_listed()

    def refresh_listed(self) -> None:
        """Update ``listed``, as LiveKit does every five seconds."""
        self.listed.CopyFrom(self.settings)
        everybody = self.participants.values()
        self.listed.num_participants = sum(not p.dependent for p in everybody)
        self.listed.num_publishers = sum(p.is_publisher for p in everybody)

    def _close_when_empty(self) -> None:
        if self.closed or any(not p.dependent for p in self.participants.values()):
            return
        timeout = self.settings.departure_timeout if self._ever_left else self.settings.empty_timeout
        self._stop("close")
        self._timers["close"] = self._clock.callLater(timeout, self.close)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None and timer.active():
            timer.cancel()
