# SPDX-License-Identifier: Apache-2.0
"""The state of the stand-in SFU, and what its clients do, as Python methods. Sandbox.

Read from LiveKit 1.13's ``pkg/service`` (``rtcservice.go``, ``roommanager.go``, ``auth.go``).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from livekit.protocol.models import DisconnectReason, ParticipantInfo, TrackInfo
from livekit.protocol.webhook import WebhookEvent

from lotusguard.sandbox.livekit.changes import Change
from lotusguard.sandbox.livekit.grants import VideoGrant
from lotusguard.sandbox.livekit.participant import JoinRefused, Participant
from lotusguard.sandbox.livekit.room import SfuRoom
from lotusguard.sandbox.livekit.tokens import BadToken, Claims, api_key_of, mint, verify

REMEMBERED = 10_000
"""How many entries each record keeps."""


class Sfu:
    """Rooms and participants.

    :ivar events: the latest webhook events, oldest first, also those that were sent nowhere.
    :ivar granted_by_token: by (alias, participant sid), the grant of the token that the session began with.
    :ivar update_log: the latest changes that were made through RoomService, oldest first.
    :ivar deaf: answer UpdateParticipant with the participant as it is, and change nothing.
    :ivar stale: entries of participants that no node serves any more; see ``add_stale``.
    """

    def __init__(
        self,
        *,
        key: str,
        secret: str,
        auto_create: bool,
        exp_required: bool,
        remote_unmute: bool,
        now: Callable[[], float],
        clock: Any,
    ) -> None:
        self.keys = {key: secret}
        self.key, self.secret = key, secret
        self.auto_create = auto_create
        self.exp_required = exp_required
        self.remote_unmute = remote_unmute
        self.now = now
        self.rooms: dict[str, SfuRoom] = {}
        self.deaf = False
        self.stale: dict[tuple[str, str], tuple[ParticipantInfo, int]] = {}
        self.events: deque[WebhookEvent] = deque(maxlen=REMEMBERED)
        self.update_log: deque[Change] = deque(maxlen=REMEMBERED)
        self.granted_by_token: dict[tuple[str, str], VideoGrant] = {}
        self._clock = clock

    def emit(self, event: WebhookEvent) -> None:
        """Take a webhook event of a room."""
        if event.event == "room_finished":
            self.rooms.pop(event.room.name, None)
        self.events.append(event)

    def verified(self, token: str) -> Claims:
        """The claims of a valid token. :raises BadToken: with the text that LiveKit answers."""
        try:
            secret = self.keys.get(api_key_of(token))
        except BadToken:
            raise BadToken("invalid authorization token") from None
        if not secret:
            raise BadToken("invalid API key")
        try:
            return verify(token, secret, now=self.now(), exp_required=self.exp_required)
        except BadToken as error:
            raise BadToken(f"invalid authorization token: {error}") from None

    # -- clients -------------------------------------------------------------------------------------------

    def connect(self, token: str, publish: str | None = None, *, room: str = "", activate: bool = True) -> Participant:
        """A client connects to ``/rtc`` with a token. The session has the grants of *this* token, whatever was revoked
        in an older session.

        :param publish: ``/rtc?publish=…``: join as a second, publish-only participant ``identity#…``.
        :param room: the room to join if the token names none.
        :param activate: whether the media connection is established; otherwise the participant stays JOINING.
        :raises JoinRefused: if the SFU would not let the client in.
        """
        try:
            claims = self.verified(token)
        except BadToken as error:
            raise JoinRefused(401, str(error)) from None
        if claims.video is None or not claims.video.room_join:
            raise JoinRefused(401, "permissions denied")
        grant, identity = copy.deepcopy(claims.video), claims.identity
        if not identity:
            raise JoinRefused(400, "identity cannot be empty")
        alias = grant.room or room
        if not alias:
            raise JoinRefused(400, "no room name")
        if publish:
            if grant.can_publish is False:
                raise JoinRefused(401, "permissions denied")
            grant.can_subscribe = False
            identity += f"#{publish}"
        if alias not in self.rooms and not self.auto_create:
            raise JoinRefused(404, "requested room does not exist")
        return self._join(self.open_room(alias), identity, claims, grant, activate)

    def _join(self, room: SfuRoom, identity: str, claims: Claims, grant: VideoGrant, activate: bool) -> Participant:
        older = room.participants.get(identity)
        if older is not None:
            room.remove(older, DisconnectReason.DUPLICATE_IDENTITY)
        if not room.has_place():
            raise JoinRefused(503, "room has exceeded its max participants")
        participant = Participant(room, identity, claims, grant, self.now())
        self.stale.pop((room.name, identity), None)
        self.granted_by_token[room.name, participant.sid] = copy.deepcopy(grant)
        if len(self.granted_by_token) > REMEMBERED:
            del self.granted_by_token[next(iter(self.granted_by_token))]
        room.add(participant)
        if activate:
            participant.activate()
        return participant

    def participant(self, alias: str, identity: str) -> Participant | None:
        """The participant of a room with that identity, if there is one."""
        room = self.rooms.get(alias)
        return None if room is None else room.participants.get(identity)

    def publish_track(
        self, alias: str, identity: str, source: int | str, type: int | str | None = None
    ) -> TrackInfo | None:
        """A client publishes a track; ``None`` if the SFU refuses it or there is no such participant."""
        participant = self.participant(alias, identity)
        return None if participant is None else participant.publish(source, type)

    def unpublish(self, alias: str, identity: str, track_sid: str) -> None:
        """A client stops publishing a track."""
        participant = self.participant(alias, identity)
        if participant is not None:
            participant.unpublish(track_sid)

    def disconnect(self, alias: str, identity: str, reason: int | str = DisconnectReason.CLIENT_INITIATED) -> None:
        """A session ends and ``participant_left`` is sent.

        :param reason: any ``DisconnectReason``, by number or name; by default the client left.
        """
        participant = self.participant(alias, identity)
        if participant is not None:
            number = DisconnectReason.Value(reason) if isinstance(reason, str) else reason
            participant.room.remove(participant, number)

    def lose(self, alias: str, identity: str) -> None:
        """A session ends without any webhook, as if its node had crashed."""
        participant = self.participant(alias, identity)
        if participant is not None:
            self.rooms[alias].forget(participant)

    def refreshed_token(self, alias: str, identity: str) -> str:
        """See ``Participant.refreshed_token``."""
        return self.rooms[alias].participants[identity].refreshed_token()

    # -- the server ----------------------------------------------------------------------------------------

    def restart(self, *, graceful: bool = False) -> None:
        """End every session and room, as a restart of the SFU does.

        :param graceful: send ``participant_left`` with SERVER_SHUTDOWN and ``room_finished``, as LiveKit does when it
            is told to stop. Otherwise no webhook is sent, also none that was still queued, as after a crash.
        """
        for room in list(self.rooms.values()):
            if graceful:
                room.close(DisconnectReason.SERVER_SHUTDOWN)
            else:
                room.abandon()
        self.rooms.clear()
        self.stale.clear()

    def add_stale(self, alias: str, identity: str, status: int = 404) -> ParticipantInfo:
        """List a participant that a crashed node left behind: Update and Remove answer 404 or 503 for it."""
        info = ParticipantInfo(
            sid=f"PA_stale{len(self.stale)}",
            identity=identity,
            state=ParticipantInfo.State.ACTIVE,
            joined_at=int(self.now()),
            permission=VideoGrant().to_permission(),
        )
        self.open_room(alias)
        self.stale[alias, identity] = (info, status)
        return info

    def open_room(self, alias: str) -> SfuRoom:
        """The room of that name; it is created if it does not exist."""
        room = self.rooms.get(alias)
        if room is None or room.closed:
            room = SfuRoom(alias, emit=self.emit, clock=self._clock, now=self.now, sign=self._sign)
            self.rooms[alias] = room
        return room

    def _sign(self, claims: Mapping[str, Any], valid_for: float) -> str:
        return mint(self.key, self.secret, claims, now=self.now(), valid_for=valid_for)
