# SPDX-License-Identifier: Apache-2.0
"""A call, played from a room's first join to an outage and back, with each step looked at where it counts: in what
the stand-ins saw. ``lotusguard sandbox --play``. Sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from livekit.protocol.models import TrackSource
from twisted.internet.task import deferLater

from lotusguard.clients.http import Answer
from lotusguard.rules.identity import user_of
from lotusguard.rules.policy import ROOM_QUALITY, VOICE_LIMIT
from lotusguard.rules.tokens import read_unverified
from lotusguard.sandbox.demo.sandbox import SERVER_NAME, Refused, Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from lotusguard.terminal import Account, NotAsItShould

PATIENCE = 6.0
"""Seconds within which what is to come about by itself has to."""
POLICY_TTL = 0.5
FULL = "403 This voice channel is full."
SETTINGS: dict[str, object] = {
    "guard_policy_ttl": POLICY_TTL,
    "guard_reconcile_interval": 0.5,
    "guard_restore": True,
}
"""What the guard is told in the play, so that it is short; the rest is as it comes."""


def expect(holds: object, instead: str) -> None:
    """:raises NotAsItShould: it does not hold; ``instead`` says what was seen."""
    if not holds:
        raise NotAsItShould(instead)


class Demo:
    """The play. :param sandbox: a started sandbox, made with ``SETTINGS``."""

    def __init__(self, sandbox: Sandbox, account: Account) -> None:
        self._stage = sandbox
        self._account = account
        self._logins = {name: sandbox.homeserver.add_user(name) for name in ("alice", "bob", "carol", "dave", "erin")}
        self._room = sandbox.homeserver.create_room("alice", joined=self._logins)
        self._sessions: dict[str, Participant] = {}
        # Who callers are is asked of a worker, as larger Synapses have it: it lives on while the main process,
        # with the admin API, is away. Without one, lk-jwt-service itself would let none of its users in then.
        self._worker = FakeSynapse(sandbox.reactor, SERVER_NAME)
        self._worker.openid = sandbox.homeserver.openid

    async def run(self) -> bool:
        """Demo it. :return: whether everything turned out as it should."""
        await self._worker.start()
        self._stage.upstream.homeservers[SERVER_NAME] = self._worker.url
        try:
            for act in (self._two_seats, self._a_screen_share, self._an_outage, self._normality):
                await act()
        except NotAsItShould:
            pass
        finally:
            await self._worker.stop()
        self._account.end()
        return not self._account.failed

    async def _two_seats(self) -> None:
        step = self._account.step
        self._account.act("A room of two seats")
        await step("alice, the room's admin, limits its call to two users", self._set(VOICE_LIMIT, {"max_users": 2}))
        await step("alice joins", self._joins("alice", "alice"))
        await step("bob joins, at the other token route", self._joins("bob", "alice bob", new=True))
        rejoin = self._joins("alice", "alice bob", device="TABLET", as_="alice's tablet")
        await step("alice joins again, with a second device", rejoin)
        await step("carol is refused", self._refused("carol"))
        await step("carol is refused at the other token route, too", self._refused("carol", new=True))
        await step("bob hangs up, and his seat is carol's", self._takes_over("bob", "carol", "alice carol"))

    async def _a_screen_share(self) -> None:
        step = self._account.step
        self._account.act("A screen share")
        await step("alice talks and shares her screen, from the tablet", self._shares())
        await step("screen shares are forbidden half-way: hers disappears", self._share_forbidden())
        await step("alice tries again", self._share_refused())
        await step("her next token would not let her either", self._narrow_token("alice", "policy"))

    async def _an_outage(self) -> None:
        step = self._account.step
        self._account.act("Synapse goes away", "Its main process; a worker still tells lk-jwt-service who callers are.")
        await step("its admin API does not answer any more", self._synapse_goes())
        await step("dave is refused: the last known cap serves", self._refused("dave", known=False))
        await step("carol hangs up, and her seat is dave's", self._takes_over("carol", "dave", "alice dave"))
        await step("his token obeys the last known permissions", self._narrow_token("dave", "stale_policy"))
        await step("erin joins in a room that was never asked about", self._unknown_room())

    async def _normality(self) -> None:
        step = self._account.step
        self._account.act("Synapse is back")
        await step("everything is enforced again", self._synapse_returns())
        await step("screen shares are allowed again: alice's is given back (GUARD_RESTORE)", self._share_restored())
        await step("a third seat is made", self._set(VOICE_LIMIT, {"max_users": 3}))
        await step("carol has it", self._joins_in_time("carol", "alice carol dave"))

    # -- steps: each does something, looks at what came of it, and says what it saw ----------------------

    async def _set(self, event: str, content: dict[str, Any]) -> str:
        """As a room's admin does, over the client API."""
        path = f"/_matrix/client/v3/rooms/{self._room.replace('!', '%21')}/state/{event}/"
        headers = {"Authorization": f"Bearer {self._logins['alice']}"}
        url = self._stage.homeserver.url + path
        answer = await self._stage.request("PUT", url, json.dumps(content).encode(), headers)
        expect(answer.code == 200, f"Synapse answered {answer.code}")
        kept = self._stage.homeserver.rooms[self._room].state[event, ""]["content"]
        expect(kept == content, f"the room's state is {kept}")
        return f"{event} {json.dumps(content)}"

    async def _joins(self, name: str, present: str, *, as_: str = "", **how: Any) -> str:
        try:
            self._sessions[as_ or name] = await self._stage.enter(_id(name), self._room, **how)
        except Refused as refused:
            raise NotAsItShould(f"refused: {refused}") from None
        users = self._users()
        expect(users == present.split(), f"the SFU has {users}")
        connections = len(self._participants())
        held = await self._until(lambda: self._seats_held(len(users)), "the guard counts other seats")
        return f"200; in the call: {_listed(users)} ({_many(connections, 'connection')}, {_many(held, 'seat')} taken)"

    async def _joins_in_time(self, name: str, present: str) -> str:
        """Once the guard has heard of the changed policy, which takes as long as it believes the old one."""

        async def let_in() -> bool:
            return (await self._stage.ask_token(_id(name), self._room)).code == 200

        await self._until(let_in, f"{name} is still refused")
        return await self._joins(name, present)

    async def _refused(self, name: str, *, known: bool = True, **how: Any) -> str:
        """:param known: whether the guard can find out who asks, and so refuses before upstream has done anything."""
        issued, rooms = len(self._stage.upstream.issued), set(self._stage.livekit.rooms)
        answer = await self._stage.ask_token(_id(name), self._room, **how)
        text = f"{answer.code} {json.loads(answer.body).get('error', 'and a token')}"
        expect(text == FULL, f"answered {text}")
        expect(answer.headers.getRawHeaders("access-control-allow-origin") == ["*"], "no CORS header")
        expect(name not in self._users(), f"the SFU has {self._users()}")
        if not known:
            return f"{text} (only lk-jwt-service could tell who asks: its token was kept back)"
        expect(len(self._stage.upstream.issued) == issued, "lk-jwt-service had issued a token all the same")
        expect(set(self._stage.livekit.rooms) == rooms, "lk-jwt-service had made a room all the same")
        return f"{text} (lk-jwt-service was not asked for a token)"

    async def _takes_over(self, leaver: str, name: str, present: str) -> str:
        session = self._sessions.pop(leaver)
        self._stage.livekit.disconnect(session.room.name, session.identity)
        return await self._joins(name, present)

    async def _shares(self) -> str:
        tablet = self._sessions["alice's tablet"]
        for source in ("MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"):
            expect(tablet.publish(source), f"the SFU does not let her publish {source}")
        return f"the SFU has her {_tracks(tablet)}"

    async def _share_forbidden(self) -> str:
        tablet = self._sessions["alice's tablet"]
        before = tablet.info().permission
        said = await self._set(ROOM_QUALITY, {"allow_screenshare": False})
        await self._until(lambda: _tracks(tablet) == "microphone", "she still shares")
        after = tablet.info().permission
        expect(tablet.connected, "she was thrown out of the call")
        same = ("can_publish", "can_subscribe", "can_publish_data", "can_update_metadata")
        changed = [flag for flag in same if getattr(before, flag) != getattr(after, flag)]
        expect(not changed, f"other permissions were changed: {changed}")
        return f"{said}; she stays in, with her {_tracks(tablet)}"

    async def _share_refused(self) -> str:
        tablet = self._sessions["alice's tablet"]
        expect(tablet.publish("SCREEN_SHARE") is None, "the SFU let her")
        expect(tablet.publish("CAMERA"), "the SFU does not let her turn her camera on")
        return f"the SFU refuses it; her camera it takes: {_tracks(tablet)}"

    async def _narrow_token(self, name: str, reason: str) -> str:
        answer = await self._stage.ask_token(_id(name), self._room)
        expect(answer.code == 200, f"answered {answer.code}")
        claims = read_unverified(json.loads(answer.body)["jwt"]) or {}
        sources = claims.get("video", {}).get("canPublishSources")
        expect(sources == ["microphone", "camera"], f"the token grants {sources}")
        decision = await self._last_decision()
        expect(decision["reason"] == reason, f"it was decided by {decision['reason']}")
        return f"it grants {_listed(sources)}, for {self._stage.settings.guard_token_ttl:.0f} s; decided by {reason}"

    async def _synapse_goes(self) -> str:
        await self._stage.homeserver.stop_listening()
        await deferLater(self._stage.reactor, 1.2 * POLICY_TTL)  # now nothing is believed for being fresh
        answer, ready = await self._readyz()
        expect(answer.code == 503, f"/readyz answers {answer.code}")
        expect(any("synapse" in reason for reason in ready["reasons"]), f"/readyz says {ready['reasons']}")
        return f"/readyz: 503, {'; '.join(ready['reasons'])}"

    async def _unknown_room(self) -> str:
        room_id = self._stage.homeserver.create_room("erin")
        try:
            session = await self._stage.enter(_id("erin"), room_id)
        except Refused as refused:
            raise NotAsItShould(f"refused: {refused}") from None
        expect(session.publish("SCREEN_SHARE"), "the SFU does not let her share her screen")
        decision = await self._last_decision()
        said = [what for what in decision["unenforced"] if what.startswith("policy:")]
        expect(decision["room_id"] == room_id and said, "the guard does not say that it enforced nothing")
        return f"200, unnarrowed; the guard says so: not enforced, {', '.join(said)}"

    async def _synapse_returns(self) -> str:
        await self._stage.homeserver.listen()

        async def ready() -> bool:
            return (await self._readyz())[0].code == 200

        await self._until(ready, "/readyz does not say so")
        return "/readyz: 200"

    async def _share_restored(self) -> str:
        tablet = self._sessions["alice's tablet"]
        said = await self._set(ROOM_QUALITY, {"allow_screenshare": True})
        await self._until(lambda: tablet.publish("SCREEN_SHARE"), "the SFU still refuses her")
        return f"{said}; in the call she has {_tracks(tablet)}"

    # -- looking -----------------------------------------------------------------------------------------

    def _participants(self) -> list[tuple[str, str]]:
        """User and identity of everybody in the room's call, as the SFU has them."""
        issued = {(token.alias, token.identity): token.user for token in self._stage.upstream.issued}
        aliases = {token.alias for token in self._stage.upstream.issued if token.room == self._room}
        return [
            (issued.get((alias, identity), user_of(identity)), identity)
            for alias, room in self._stage.livekit.rooms.items()
            if alias in aliases
            for identity in room.participants
        ]

    def _users(self) -> list[str]:
        return sorted({user.partition(":")[0][1:] for user, _ in self._participants()})

    async def _seats_held(self, expected: int) -> int:
        rooms = (await self._rooms())["rooms"]
        held: int = next((room["seats_held"] for room in rooms if room["room_id"] == self._room), 0)
        return held if held == expected else 0

    async def _last_decision(self) -> dict[str, Any]:
        decision: dict[str, Any] = (await self._rooms())["decisions"][-1]
        return decision

    async def _rooms(self) -> dict[str, Any]:
        rooms: dict[str, Any] = json.loads((await self._stage.operator("GET", "/rooms")).body)
        return rooms

    async def _readyz(self) -> tuple[Answer, dict[str, Any]]:
        answer = await self._stage.operator("GET", "/readyz")
        return answer, json.loads(answer.body)

    async def _until(self, condition: Callable[[], Any], otherwise: str) -> Any:
        """Wait for what the guard does by itself. :raises NotAsItShould: it did not in time."""
        end = self._stage.reactor.seconds() + PATIENCE
        while True:
            held = condition()
            if isinstance(held, Awaitable):
                held = await held
            if held:
                return held
            expect(self._stage.reactor.seconds() < end, f"{otherwise}, {PATIENCE:.0f} s later")
            await deferLater(self._stage.reactor, 0.02)


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _id(name: str) -> str:
    return f"@{name}:{SERVER_NAME}"


def _tracks(participant: Participant) -> str:
    names = [TrackSource.Name(track.source).lower() for track in participant.info().tracks]
    return _listed([name.replace("_", " ") for name in names])


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


async def play(reactor: Any, account: Account) -> bool:
    """Set the sandbox, play, clear it. :return: whether everything turned out as it should."""
    sandbox = Sandbox(reactor, **SETTINGS)
    await sandbox.start()
    try:
        return await Demo(sandbox, account).run()
    finally:
        await sandbox.stop()
