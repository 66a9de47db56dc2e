# SPDX-License-Identifier: Apache-2.0
"""The demo: a call from the first join to an outage of Synapse and back. ``lotusguard sandbox --demo``. Sandbox.

Each step checks its effect in the stand-ins, not in the guard's answers alone.
"""

from __future__ import annotations

import json
from typing import Any

from livekit.protocol.models import TrackSource
from twisted.internet.task import deferLater

from lotusguard.rules.jwt import read_unverified
from lotusguard.rules.state import ROOM_QUALITY, VOICE_LIMIT
from lotusguard.sandbox.demo.lobby import LobbyDemo
from lotusguard.sandbox.demo.members import MembersDemo
from lotusguard.sandbox.demo.observer import Observer, expect
from lotusguard.sandbox.demo.sandbox import SERVER_NAME, Refused, Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from lotusguard.terminal import StepFailed, StepReport

POLICY_TTL = 0.5
FULL = "403 This voice channel is full."
SETTINGS: dict[str, object] = {
    "guard_policy_ttl": POLICY_TTL,
    "guard_reconcile_interval": 0.5,
    "guard_restore": True,
    "guard_invites": "local",
}
"""The guard's settings in the demo: short intervals, so that it does not take long, and it may be invited."""


class Demo:
    """The steps of the demo.

    :param sandbox: a started sandbox, made with ``SETTINGS``.
    """

    def __init__(self, sandbox: Sandbox, report: StepReport) -> None:
        self._sandbox = sandbox
        self._report = report
        self._logins = {name: sandbox.homeserver.add_user(name) for name in ("alice", "bob", "carol", "dave", "erin")}
        self._room = sandbox.homeserver.create_room("alice", joined=self._logins)
        self._call = Observer(sandbox, self._room)
        self._sessions: dict[str, Participant] = {}
        # lk-jwt-service verifies OpenID tokens at a worker of Synapse, which keeps running while the main process with
        # the admin API is down. Without a worker, lk-jwt-service itself would refuse everybody then.
        self._worker = FakeSynapse(sandbox.reactor, SERVER_NAME)
        self._worker.openid = sandbox.homeserver.openid

    async def run(self) -> bool:
        """Run all steps until one fails. :return: whether every step succeeded."""
        await self._worker.start()
        self._sandbox.upstream.homeservers[SERVER_NAME] = self._worker.url
        try:
            members = MembersDemo(self._sandbox, self._report)
            lobby = LobbyDemo(self._sandbox, self._report)
            parts = (self._two_seats, self._a_screen_share, self._an_outage, self._recovery, members.run, lobby.run)
            for part in parts:
                await part()
        except StepFailed:
            pass
        finally:
            await self._worker.stop()
        self._report.end()
        return not self._report.failed

    async def _two_seats(self) -> None:
        step = self._report.step
        self._report.section("A room of two seats")
        await step("alice, the room's admin, limits the call to two users", self._set(VOICE_LIMIT, {"max_users": 2}))
        await step("alice joins", self._joins("alice", "alice"))
        await step("bob joins at the other token route", self._joins("bob", "alice bob", new=True))
        rejoin = self._joins("alice", "alice bob", device="TABLET", as_="alice's tablet")
        await step("alice joins again, with a second device", rejoin)
        await step("carol is refused", self._refused("carol"))
        await step("carol is refused at the other token route too", self._refused("carol", new=True))
        await step("bob leaves, and carol takes his seat", self._takes_over("bob", "carol", "alice carol"))

    async def _a_screen_share(self) -> None:
        step = self._report.step
        self._report.section("A screen share")
        await step("alice talks and shares her screen from the tablet", self._shares())
        await step("screen shares are forbidden during the call: hers ends", self._share_forbidden())
        await step("alice tries to share again", self._share_refused())
        await step("her next token does not allow it either", self._restricted_token("alice", "policy"))

    async def _an_outage(self) -> None:
        step = self._report.step
        self._report.section(
            "Synapse is down", "Its main process, that is. A worker still verifies callers for lk-jwt-service."
        )
        await step("its admin API refuses connections", self._synapse_goes())
        await step("dave is refused by the last known limit", self._refused("dave", known=False))
        await step("carol leaves, and dave takes her seat", self._takes_over("carol", "dave", "alice dave"))
        await step("his token follows the last known permissions", self._restricted_token("dave", "stale_policy"))
        await step("erin joins in a room that the guard has never looked up", self._unknown_room())

    async def _recovery(self) -> None:
        step = self._report.step
        self._report.section("Synapse is back")
        await step("the guard is ready again", self._synapse_returns())
        await step("screen shares are allowed again: alice may share (GUARD_RESTORE)", self._share_restored())
        await step("alice raises the limit to three users", self._set(VOICE_LIMIT, {"max_users": 3}))
        await step("carol takes the third seat", self._joins_in_time("carol", "alice carol dave"))

    # -- steps: each acts, checks the effect and returns what it saw ---------------------------------------

    async def _set(self, event: str, content: dict[str, Any]) -> str:
        """Set a state event over the client API, as the room's admin."""
        path = f"/_matrix/client/v3/rooms/{self._room.replace('!', '%21')}/state/{event}/"
        headers = {"Authorization": f"Bearer {self._logins['alice']}"}
        url = self._sandbox.homeserver.url + path
        answer = await self._sandbox.request("PUT", url, json.dumps(content).encode(), headers)
        expect(answer.code == 200, f"Synapse answered {answer.code}")
        kept = self._sandbox.homeserver.rooms[self._room].state[event, ""]["content"]
        expect(kept == content, f"the room's state is {kept}")
        return f"{event} {json.dumps(content)}"

    async def _joins(self, name: str, present: str, *, as_: str = "", **how: Any) -> str:
        try:
            self._sessions[as_ or name] = await self._sandbox.enter(_id(name), self._room, **how)
        except Refused as refused:
            raise StepFailed(f"refused: {refused}") from None
        users = self._call.users()
        expect(users == present.split(), f"the SFU has {users}")
        connections = len(self._call.participants())
        held = await self._call.until(lambda: self._call.seats_held(len(users)), "the guard counts other seats")
        return f"200; in the call: {_listed(users)} ({_many(connections, 'connection')}, {_many(held, 'seat')} taken)"

    async def _joins_in_time(self, name: str, present: str) -> str:
        """Join once the guard has read the changed policy; the old one stays cached for `POLICY_TTL`."""

        async def let_in() -> bool:
            return (await self._sandbox.ask_token(_id(name), self._room)).code == 200

        await self._call.until(let_in, f"{name} is still refused")
        return await self._joins(name, present)

    async def _refused(self, name: str, *, known: bool = True, **how: Any) -> str:
        """:param known: whether the guard can verify the caller, so that upstream is not asked at all."""
        issued, rooms = len(self._sandbox.upstream.issued), set(self._sandbox.livekit.rooms)
        answer = await self._sandbox.ask_token(_id(name), self._room, **how)
        text = f"{answer.code} {json.loads(answer.body).get('error', 'and a token')}"
        expect(text == FULL, f"answered {text}")
        expect(answer.headers.getRawHeaders("access-control-allow-origin") == ["*"], "no CORS header")
        expect(name not in self._call.users(), f"the SFU has {self._call.users()}")
        if not known:
            return f"{text} (only lk-jwt-service could verify the caller; its token was withheld)"
        expect(len(self._sandbox.upstream.issued) == issued, "lk-jwt-service had issued a token")
        expect(set(self._sandbox.livekit.rooms) == rooms, "lk-jwt-service had created a room")
        return f"{text} (lk-jwt-service was not asked for a token)"

    async def _takes_over(self, leaver: str, name: str, present: str) -> str:
        session = self._sessions.pop(leaver)
        self._sandbox.livekit.disconnect(session.room.name, session.identity)
        return await self._joins(name, present)

    async def _shares(self) -> str:
        tablet = self._sessions["alice's tablet"]
        for source in ("MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"):
            expect(tablet.publish(source), f"the SFU refuses her {source}")
        return f"the SFU has her {_tracks(tablet)}"

    async def _share_forbidden(self) -> str:
        tablet = self._sessions["alice's tablet"]
        before = tablet.info().permission
        said = await self._set(ROOM_QUALITY, {"allow_screenshare": False})
        await self._call.until(lambda: _tracks(tablet) == "microphone", "she still shares")
        after = tablet.info().permission
        expect(tablet.connected, "she was removed from the call")
        same = ("can_publish", "can_subscribe", "can_publish_data", "can_update_metadata")
        changed = [flag for flag in same if getattr(before, flag) != getattr(after, flag)]
        expect(not changed, f"other permissions were changed: {changed}")
        return f"{said}; she stays in the call with her {_tracks(tablet)}"

    async def _share_refused(self) -> str:
        tablet = self._sessions["alice's tablet"]
        expect(tablet.publish("SCREEN_SHARE") is None, "the SFU accepted it")
        expect(tablet.publish("CAMERA"), "the SFU refuses her camera")
        return f"the SFU refuses it and accepts her camera: {_tracks(tablet)}"

    async def _restricted_token(self, name: str, reason: str) -> str:
        answer = await self._sandbox.ask_token(_id(name), self._room)
        expect(answer.code == 200, f"answered {answer.code}")
        claims = read_unverified(json.loads(answer.body)["jwt"]) or {}
        sources = claims.get("video", {}).get("canPublishSources")
        expect(sources == ["microphone", "camera"], f"the token grants {sources}")
        decision = await self._call.last_decision()
        expect(decision["reason"] == reason, f"it was decided by {decision['reason']}")
        return f"it grants {_listed(sources)}, for {self._sandbox.settings.guard_token_ttl:.0f} s; decided by {reason}"

    async def _synapse_goes(self) -> str:
        await self._sandbox.homeserver.stop_listening()
        await deferLater(self._sandbox.reactor, 1.2 * POLICY_TTL)  # no cached policy is fresh any more
        answer, ready = await self._call.readyz()
        expect(answer.code == 503, f"/readyz answers {answer.code}")
        expect(any("synapse" in reason for reason in ready["reasons"]), f"/readyz says {ready['reasons']}")
        return f"/readyz: 503, {'; '.join(ready['reasons'])}"

    async def _unknown_room(self) -> str:
        room_id = self._sandbox.homeserver.create_room("erin")
        try:
            session = await self._sandbox.enter(_id("erin"), room_id)
        except Refused as refused:
            raise StepFailed(f"refused: {refused}") from None
        expect(session.publish("SCREEN_SHARE"), "the SFU refuses her screen share")
        decision = await self._call.last_decision()
        said = [what for what in decision["unenforced"] if what.startswith("policy:")]
        expect(decision["room_id"] == room_id and said, "the guard does not report that it enforced nothing")
        return f"200 with all sources; the guard reports what it did not enforce: {', '.join(said)}"

    async def _synapse_returns(self) -> str:
        await self._sandbox.homeserver.listen()

        async def ready() -> bool:
            return (await self._call.readyz())[0].code == 200

        await self._call.until(ready, "/readyz does not say that it is ready")
        return "/readyz: 200"

    async def _share_restored(self) -> str:
        tablet = self._sessions["alice's tablet"]
        said = await self._set(ROOM_QUALITY, {"allow_screenshare": True})
        await self._call.until(lambda: tablet.publish("SCREEN_SHARE"), "the SFU still refuses her")
        return f"{said}; she publishes {_tracks(tablet)}"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _id(name: str) -> str:
    return f"@{name}:{SERVER_NAME}"


def _tracks(participant: Participant) -> str:
    names = [TrackSource.Name(track.source).lower() for track in participant.info().tracks]
    return _listed([name.replace("_", " ") for name in names])


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


async def run_demo(reactor: Any, report: StepReport) -> bool:
    """Start a sandbox, run the demo and stop everything. :return: whether every step succeeded."""
    sandbox = Sandbox(reactor, **SETTINGS)
    await sandbox.start()
    try:
        return await Demo(sandbox, report).run()
    finally:
        await sandbox.stop()
