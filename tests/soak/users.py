# SPDX-License-Identifier: Apache-2.0
"""The virtual users of a soak: they ask for tokens, join, publish what they may and may not, and leave."""

from __future__ import annotations

import json
from random import Random
from typing import Any
from uuid import uuid4

from attrs import Factory, define
from livekit.protocol.models import DisconnectReason
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.web.http_headers import Headers

from lotusguard.clients.http import Answer, FixedAgent, fetch
from lotusguard.rules.identity import room_alias
from lotusguard.rules.jwt import read_unverified
from lotusguard.sandbox.livekit.participant import JoinRefused, Participant
from lotusguard.sandbox.livekit.server import FakeLiveKit
from lotusguard.sandbox.livekit.webhooks import Sent
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from tests.soak.oracle import Oracle
from tests.soak.record import REMEMBERED, SEAT_TTL, Ask, Stay

LATE = 25.0
"""Seconds after which a request has hung: more than all timeouts of the guard together."""
ANSWERED_WITHIN = 2.0
"""Seconds within which a guard has to answer a webhook while nothing is wrong: LiveKit sends no other one of that room
before."""
NOT_READ = (0, 400, 413, 429, 503)
"""Answers to webhooks that no guard may have acted on. It acts on others even if upstream rejects them."""
UNREACHABLE = ("guard", "killed", "processors", "stand-ins")
"""Faults in which a connection may be lost, or not be made in time."""
DEPARTURES = ("participant_left", "participant_connection_aborted")
PUBLISHED = ("MICROPHONE", "CAMERA", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO")


@define
class World:
    """What all users of a soak share.

    :ivar untold: by the SFU's name for them, the sessions of whose end no guard has been told yet.
    """

    reactor: Any
    agent: FixedAgent
    homeserver: FakeSynapse
    sfu: FakeLiveKit
    oracle: Oracle
    rooms: list[str]
    dice: Random
    sessions: list[tuple[Participant, Stay]] = Factory(list)
    untold: dict[str, Stay] = Factory(dict)
    running: bool = True

    def record_departures(self) -> None:
        """Record the sessions that have ended."""
        now = self.reactor.seconds()
        for participant, stay in self.sessions:
            if not participant.connected:
                stay.ended = now
                if participant.disconnect_reason == DisconnectReason.PARTICIPANT_REMOVED:
                    self.oracle.removed(stay, now)
        self.sessions = [(participant, stay) for participant, stay in self.sessions if stay.ended is None]
        self.untold = {
            sid: stay for sid, stay in self.untold.items() if stay.ended is None or stay.ended > now - REMEMBERED
        }

    def arrived(self, participant: Participant, ask: Ask) -> Stay:
        """Record a session that has begun."""
        stay = self.oracle.arrived(ask, self.reactor.seconds(), lambda: participant.connected)
        self.oracle.counts["sessions"] += 1
        self.sessions.append((participant, stay))
        self.untold[participant.sid] = stay
        return stay

    def webhook_sent(self, sent: Sent) -> None:
        """Record what a guard was told, and how long LiveKit waited for its answer."""
        now, oracle = self.reactor.seconds(), self.oracle
        if sent.seconds > ANSWERED_WITHIN and not oracle.disturbances.any_between(now - sent.seconds, now):
            oracle.counts["webhooks answered late without a fault"] += 1
        if sent.event.event in DEPARTURES and sent.status not in NOT_READ:
            stay = self.untold.pop(sent.event.participant.sid, None)
            if stay is not None:
                oracle.told(stay, now)

    async def pause(self, least: float, most: float) -> None:
        await deferLater(self.reactor, self.dice.uniform(least, most))


class User:
    """One virtual user, with one device in a call at a time and sometimes a second."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.user_id = f"@{name}:{world.homeserver.server_name}"
        world.homeserver.add_user(name)
        for room_id in world.rooms:
            world.homeserver.join(room_id, name)

    async def live(self) -> None:
        """Come and go until the soak ends."""
        world = self.world
        while world.running:
            await world.pause(0.1, 2.0)
            room_id = world.dice.choice(world.rooms)
            device = world.dice.choice(("PHONE", "TABLET"))
            entered = await self._enter(room_id, device)
            if entered is None:
                continue
            second = await self._enter(room_id, "LAPTOP") if world.dice.random() < 0.2 else None
            await self._take_part(room_id, entered)
            for participant, stay in filter(None, (entered, second)):
                self._leave(participant, stay)

    async def _take_part(self, room_id: str, entered: tuple[Participant, Stay]) -> None:
        """Publish different sources, and ask for tokens again, as clients do in the middle of a call."""
        world, participant = self.world, entered[0]
        for _ in range(world.dice.randrange(1, 6)):
            source = world.dice.choice(PUBLISHED)
            disguised = world.dice.random() < 0.1
            participant.publish("MICROPHONE" if disguised else source, "VIDEO" if disguised else None)
            await world.pause(0.5, 2.0)
            if world.dice.random() < 0.2:
                await self._ask(room_id, world.dice.choice(("PHONE", "TABLET")))
            if not participant.connected or not world.running:
                return

    def _leave(self, participant: Participant, stay: Stay) -> None:
        if participant.connected:
            self.world.sfu.disconnect(participant.room.name, participant.identity)
        self.world.record_departures()

    async def _enter(self, room_id: str, device: str) -> tuple[Participant, Stay] | None:
        """Ask for a token and, as a rule, connect with it in time."""
        world = self.world
        asked = await self._ask(room_id, device)
        if asked is None or world.dice.random() < 0.05:
            return None
        ask, token = asked
        if world.dice.random() < 0.05:
            await world.pause(SEAT_TTL + 1, SEAT_TTL + 3)
        else:
            await world.pause(0.0, 1.0)
        try:
            participant = world.sfu.connect(token)
        except JoinRefused:
            world.oracle.counts["connections the SFU refused"] += 1
            return None
        return participant, world.arrived(participant, ask)

    async def _ask(self, room_id: str, device: str) -> tuple[Ask, str] | None:
        """Ask for a token; again if there is no answer, as Element Call does. :return: ``None`` if it was refused."""
        world = self.world
        path, body = self._body(room_id, device)
        while True:
            ask = world.oracle.asked(room_id, self.user_id, uuid4().hex, world.reactor.seconds())
            try:
                answer = await self._post(path, body, ask.request_id)
                break
            except Exception as error:
                ask.ended, ask.lost = world.reactor.seconds(), True
                self._not_answered(ask, error)
                if not world.running:
                    return None
                await world.pause(0.2, 0.5)
        world.oracle.counts[f"answers {answer.code}"] += 1
        token = self._judge(ask, answer)
        return None if token is None else (ask, token)

    def _judge(self, ask: Ask, answer: Answer) -> str | None:
        oracle, now = self.world.oracle, self.world.reactor.seconds()
        ask.ended = now
        if answer.code == 403:
            oracle.refused(ask, _error(answer), now)
            return None
        token = _token(answer) if answer.code == 200 else None
        claims = None if token is None else read_unverified(token)
        if token is None or claims is None:
            if not oracle.disturbances.any_between(ask.began, now):
                oracle.counts["failures without a fault"] += 1
            return None
        oracle.issued(ask, claims, room_alias(ask.room_id), now)
        return token

    def _not_answered(self, ask: Ask, error: Exception) -> None:
        oracle, now = self.world.oracle, self.world.reactor.seconds()
        oracle.counts["connections refused or lost"] += 1
        if now - ask.began > LATE - 1:
            oracle.counts["requests that hung"] += 1
        elif not oracle.disturbances.any_between(ask.began, now, *UNREACHABLE):
            oracle.counts[f"connections lost without a fault ({type(error).__name__})"] += 1

    async def _post(self, path: str, body: dict[str, Any], request_id: str) -> Answer:
        async def exchange() -> Answer:
            headers = Headers({"Content-Type": ["application/json"], "X-Request-ID": [request_id]})
            content = json.dumps(body).encode()
            return await fetch(self.world.agent, b"POST", path.encode(), headers, content, limit=1024 * 1024)

        return await Deferred.fromCoroutine(exchange()).addTimeout(LATE, self.world.reactor)

    def _body(self, room_id: str, device: str) -> tuple[str, dict[str, Any]]:
        openid = self.world.homeserver.openid_token(self.user_id)
        if self.world.dice.random() < 0.5:
            return "/sfu/get", {"room": room_id, "device_id": device, "openid_token": openid}
        member = {"id": uuid4().hex, "claimed_user_id": self.user_id, "claimed_device_id": device}
        return "/get_token", {"room_id": room_id, "slot_id": "m.call#ROOM", "member": member, "openid_token": openid}


def _token(answer: Answer) -> str | None:
    try:
        content = json.loads(answer.body)
        token = content["jwt"]
    except (ValueError, TypeError, KeyError):
        return None
    return token if isinstance(token, str) else None


def _error(answer: Answer) -> str:
    try:
        return str(json.loads(answer.body)["error"])
    except (ValueError, TypeError, KeyError):
        return ""
