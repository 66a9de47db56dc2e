# SPDX-License-Identifier: Apache-2.0
"""The demo's part about lobbies: people wait, and are admitted, denied and removed. Sandbox."""

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
        self._report.section("A lobby", "Moderators react to a notice, or an operator decides, as here.")
        self._sandbox.homeserver.set_state(self._room, LOBBY, {"enabled": True})
        await step("erin asks to join and waits", self._waits("erin"))
        await step("erin is admitted", self._is_admitted())
        await step("dave waits and is denied", self._is_denied())
        await step("erin is removed, and refused when she comes back", self._is_removed())

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
        said = await self._moderate("erin", "admit")
        answer = await self._asking.pop("erin")
        expect(answer.code == 200, f"her request was answered {answer.code}")
        self._erin = self._sandbox.livekit.connect(json.loads(answer.body)["jwt"])
        return f"{said}; her request is answered 200, and she joins"

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
