# SPDX-License-Identifier: Apache-2.0
"""A stand-in for LiveKit: RoomService over HTTP, webhooks, and clients that are moved by Python methods. Sandbox.

Read from LiveKit 1.13's ``pkg/service`` (``roomservice.go``, ``roommanager.go``, ``auth.go``, ``utils.go``).
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from livekit.protocol.models import DisconnectReason, ParticipantInfo, TrackInfo
from livekit.protocol.webhook import WebhookEvent
from twisted.internet.defer import Deferred

from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.go.http import NOT_FOUND
from lotusguard.sandbox.livekit import twirp
from lotusguard.sandbox.livekit.control import SfuControl
from lotusguard.sandbox.livekit.grants import VideoGrant
from lotusguard.sandbox.livekit.participant import JoinRefused, Participant
from lotusguard.sandbox.livekit.room import SfuRoom
from lotusguard.sandbox.livekit.room_service import Change, RoomService
from lotusguard.sandbox.livekit.tokens import BadToken, Claims, api_key_of, mint, verify
from lotusguard.sandbox.livekit.webhooks import WebhookSender
from lotusguard.sandbox.standin import StandIn
from lotusguard.sandbox.wire import Asked, Refusal, Reply

CONTROL = "/sandbox/"
REMEMBERED = 10_000
"""How much of each record is kept."""


class FakeLiveKit(StandIn):
    """LiveKit. Route names for ``faults``: RoomService's methods, ``control``, or ``""`` for all else.

    :param webhook_urls: where events are sent; ``webhooks.urls`` may be changed later.
    :param auto_create: whether connecting makes a room that does not exist.
    :param exp_required: refuse tokens without ``exp``, as LiveKit does after 1.13.5.
    :param remote_unmute: LiveKit's ``enable_remote_unmute``.
    :param now: the time for tokens and ids, in seconds since the epoch.
    :ivar events: the latest webhook events, oldest first, whether sent anywhere or not.
    :ivar granted_by_token: by (alias, participant sid), what the token granted that it came with.
    :ivar update_log: the latest changes that RoomService was asked for, oldest first.
    :ivar room_faults: by alias, what to do instead of answering RoomService's questions about that room.
    :ivar deaf: take UpdateParticipant, tell how the participant is, and change nothing.
    :ivar stale: entries of participants that nobody serves any more; see ``add_stale``.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        key: str,
        secret: str,
        webhook_urls: Iterable[str] = (),
        auto_create: bool = True,
        exp_required: bool = False,
        remote_unmute: bool = False,
        now: Callable[[], float] = time.time,
        port: int = 0,
        clock: Any = None,
    ) -> None:
        super().__init__(reactor, port=port, clock=clock)
        self.keys = {key: secret}
        self.key, self.secret = key, secret
        self.auto_create = auto_create
        self.exp_required = exp_required
        self.remote_unmute = remote_unmute
        self.now = now
        self.rooms: dict[str, SfuRoom] = {}
        self.room_faults: dict[str, Fault] = {}
        self.deaf = False
        self.stale: dict[tuple[str, str], tuple[ParticipantInfo, int]] = {}
        self.events: deque[WebhookEvent] = deque(maxlen=REMEMBERED)
        self.update_log: deque[Change] = deque(maxlen=REMEMBERED)
        self.granted_by_token: dict[tuple[str, str], VideoGrant] = {}
        self.webhooks = WebhookSender(
            reactor, self.clock, self.pool, key=key, secret=secret, urls=webhook_urls, now=now
        )
        self._service = RoomService(self)
        self._control = SfuControl(self)

    async def stop(self) -> None:
        self.webhooks.stop()
        for room in self.rooms.values():
            room.forget_timers()
        await super().stop()

    def drained(self) -> Deferred[None]:
        """Fires when every webhook was delivered or given up."""
        return self.webhooks.drained()

    def route_of(self, asked: Asked) -> str:
        if asked.path.startswith(twirp.PREFIX):
            return asked.path.removeprefix(twirp.PREFIX)
        return "control" if asked.path.startswith(CONTROL) else ""

    def fault_for(self, asked: Asked, route: str) -> Fault | None:
        if self.room_faults and route in twirp.REQUESTS:
            about = getattr(twirp.read(asked, route)[0], "room", "")
            if about in self.room_faults:
                return self.room_faults[about]
        return super().fault_for(asked, route)

    async def answer(self, asked: Asked, route: str) -> Reply:
        if route == "control":
            return self._control.answer(asked)
        claims = self._authenticated(asked)
        if asked.path == "/":
            return Reply(200, b"OK", [("Content-Type", "text/plain; charset=utf-8")])
        if not route:
            return NOT_FOUND
        message, as_json = twirp.read(asked, route)
        answered = self._service.call(route, message, claims.video if claims else None)
        return twirp.reply(answered, as_json=as_json)

    def _authenticated(self, asked: Asked) -> Claims | None:
        """The middleware before all routes; its own errors are plain text."""
        header = asked.header("Authorization")
        if not header:
            return None
        if not header.startswith("Bearer "):
            raise _plain_401("invalid authorization header. Must start with Bearer ")
        return self._verified(header.removeprefix("Bearer "))

    def _verified(self, token: str) -> Claims:
        try:
            secret = self.keys.get(api_key_of(token))
        except BadToken:
            raise _plain_401("invalid authorization token") from None
        if not secret:
            raise _plain_401("invalid API key")
        try:
            return verify(token, secret, now=self.now(), exp_required=self.exp_required)
        except BadToken as error:
            raise _plain_401(f"invalid authorization token: {error}") from None

    # What clients do.

    def connect(self, token: str, publish: str | None = None, *, room: str = "", activate: bool = True) -> Participant:
        """A client connects to ``/rtc`` with a token: the grants are those of *this* token, whatever was
        taken from an older session.

        :param publish: ``/rtc?publish=…``: join as a second, publish-only participant ``identity#…``.
        :param room: the room to join when the token names none.
        :param activate: whether the media connection comes about; else the participant stays JOINING.
        :raises JoinRefused: where the SFU would not let it in.
        """
        try:
            claims = self._verified(token)
        except Refusal as refusal:
            raise JoinRefused(refusal.reply.status, refusal.reply.body.decode()) from None
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
        """Who is in a room under that identity, if anybody."""
        room = self.rooms.get(alias)
        return None if room is None else room.participants.get(identity)

    def publish_track(
        self, alias: str, identity: str, source: int | str, type: int | str | None = None
    ) -> TrackInfo | None:
        """A client publishes; ``None`` where it is refused, or is not there."""
        participant = self.participant(alias, identity)
        return None if participant is None else participant.publish(source, type)

    def unpublish(self, alias: str, identity: str, track_sid: str) -> None:
        """A client stops publishing a track."""
        participant = self.participant(alias, identity)
        if participant is not None:
            participant.unpublish(track_sid)

    def disconnect(self, alias: str, identity: str, reason: int = DisconnectReason.CLIENT_INITIATED) -> None:
        """A client goes away, or is lost."""
        participant = self.participant(alias, identity)
        if participant is not None:
            participant.room.remove(participant, reason)

    def refreshed_token(self, alias: str, identity: str) -> str:
        """The token that a connected client is sent every few minutes: its grants of now, for ten minutes."""
        participant = self.rooms[alias].participants[identity]
        grant = copy.deepcopy(participant.grant)
        grant.room_join, grant.room = True, alias
        claims = {"sub": identity, "identity": identity, "video": grant.to_claim()}
        return mint(self.key, self.secret, claims, now=self.now(), valid_for=600)

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
        """The room of that name, made if need be."""
        room = self.rooms.get(alias)
        if room is None or room.closed:
            room = self.rooms[alias] = SfuRoom(alias, emit=self._emit, clock=self.clock, now=self.now)
        return room

    def _emit(self, event: WebhookEvent) -> None:
        if event.event == "room_finished":
            self.rooms.pop(event.room.name, None)
        self.events.append(event)
        self.webhooks.send(event)


def _plain_401(text: str) -> Refusal:
    return Refusal(Reply(401, text.encode(), [("Content-Type", "text/plain; charset=utf-8")]))
