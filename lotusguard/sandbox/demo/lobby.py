# SPDX-License-Identifier: Apache-2.0
"""The demo's part about lobbies: people wait, and are admitted by a reaction, denied and removed. Sandbox."""

from __future__ import annotations

import json

from twisted.internet.defer import Deferred

from lotusguard.clients.http import Answer
from lotusguard.rules.state import LOBBY
from lotusguard.sandbox.demo.observer import Observer, expect
from lotusguard.sandbox.demo.sandbox import SERVER_NAME, Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.terminal import StepReport

NOT_ADMITTED = "403 You were not admitted to this call."
REMOVED = "403 You were removed from this call."
GUARD = f"@admin:{SERVER_NAME}"
"""The guard's account in the sandbox."""
ADMIT = "✅"


class LobbyDemo:
    """A room with a lobby.

    :param sandbox: a started sandbox, in which alice, dave and erin are registered.
    """

    def __init__(self, sandbox: Sandbox, report: StepReport) -> None:
        self._sandbox = sandbox
        self._report = report
        self._room = sandbox.homeserver.create_room("alice", joined=("dave", "erin"))
        self._call = Observer(sandbox, self._room)
        self._asking: dict[str, Deferred[Answer]] = {}
        self._erin: Participant

    async def run(self) -> None:
        """Run all steps. :raises StepFailed: one failed."""
        step = self._report.step
        self._report.section("A lobby", "Moderators react to the guard's notice, or an operator decides.")
        await step("alice, a moderator, invites the guard's account and switches the lobby on", self._opens())
        await step("erin asks to join and waits; the guard asks the room", self._waits_and_is_announced())
        await step("alice reacts to the notice: erin is admitted", self._is_admitted())
        await step("dave waits, and an operator denies him", self._is_denied())
        await step("erin is removed, and refused when she comes back", self._is_removed())

    async def _opens(self) -> str:
        homeserver = self._sandbox.homeserver
        homeserver.invite(self._room, GUARD, sender=_id("alice"))
        residence = self._sandbox.guard.residence
        await self._call.until(lambda: residence.is_joined(self._room, GUARD), "the guard does not come")
        homeserver.set_state(self._room, LOBBY, {"enabled": True})
        policies = self._sandbox.guard.policies
        await self._call.until(lambda: policies.last_known(self._room).lobby, "the guard does not hear of the lobby")
        return f"{GUARD} is in the room; {LOBBY} {json.dumps({'enabled': True})}"

    async def _waits_and_is_announced(self) -> str:
        said = await self._waits("erin")
        await self._call.until(self._notice, "there is no notice")
        return f"{said}; the guard's notice is in the room"

    def _notice(self) -> str:
        """The event ID of the guard's notice about erin; "" if there is none, or it was redacted."""
        for _, event in self._sandbox.homeserver.rooms[self._room].timeline:
            if event["sender"] == GUARD and "asks to join" in str(event["content"].get("body")):
                return str(event["event_id"])
        return ""

    async def _waits(self, name: str) -> str:
        issued = len(self._sandbox.upstream.issued)
        self._asking[name] = Deferred.fromCoroutine(self._sandbox.ask_token(_id(name), self._room))
        await self._call.until(lambda: self._is_waiting(name), f"GET /lobby does not show {name}")
        expect(not self._asking[name].called, "the request was answered")
        expect(len(self._sandbox.upstream.issued) == issued, "lk-jwt-service had issued a token")
        return "the request is held; GET /lobby shows who waits; lk-jwt-service was not asked for a token"

    async def _is_waiting(self, name: str) -> bool:
        rooms = json.loads((await self._sandbox.operator("GET", "/lobby")).body)["rooms"]
        return (self._room, _id(name)) in [(room["room_id"], one["user"]) for room in rooms for one in room["waiting"]]

    async def _is_admitted(self) -> str:
        homeserver, notice = self._sandbox.homeserver, self._notice()
        homeserver.react(self._room, _id("erin"), notice, ADMIT)
        homeserver.react(self._room, _id("alice"), notice, ADMIT)
        answer = await self._asking.pop("erin")
        expect(answer.code == 200, f"her request was answered {answer.code}")
        self._erin = self._sandbox.livekit.connect(json.loads(answer.body)["jwt"])
        await self._call.until(lambda: not self._notice(), "the notice is not redacted")
        return "her request is answered 200, and she joins; the notice is redacted"

    async def _is_denied(self) -> str:
        await self._waits("dave")
        said = await self._moderate("dave", "deny")
        return f"{said}; {_expected(await self._asking.pop('dave'), NOT_ADMITTED)}"

    async def _is_removed(self) -> str:
        said = await self._moderate("erin", "remove")
        expect(not self._erin.connected, "the SFU still has her")
        return f"{said}; {_expected(await self._sandbox.ask_token(_id('erin'), self._room), REMOVED)}"

    async def _moderate(self, name: str, action: str) -> str:
        body = {"room_id": self._room, "user": _id(name), "action": action}
        answer = await self._sandbox.operator("POST", "/moderate", json.dumps(body).encode())
        expect(answer.code == 200, f"POST /moderate answered {answer.code}")
        return f"POST /moderate {json.dumps({'action': action})}"


def _expected(answer: Answer, expected: str) -> str:
    text = f"{answer.code} {json.loads(answer.body).get('error', 'and a token')}"
    expect(text == expected, f"answered {text}")
    return text


def _id(name: str) -> str:
    return f"@{name}:{SERVER_NAME}"
