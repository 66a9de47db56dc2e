# SPDX-License-Identifier: Apache-2.0
"""The demo's last part: who may be in a call at all, and what moderators do while it runs. Sandbox."""

from __future__ import annotations

import json
from typing import Any

from lotusguard.rules.state import CALL_PERMISSIONS
from lotusguard.sandbox.demo.observer import Observer, expect
from lotusguard.sandbox.demo.sandbox import SERVER_NAME, Sandbox
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.terminal import StepReport

MODERATOR = 50
NOT_A_MEMBER = "403 You are not a member of this room."


class MembersDemo:
    """A stage room: its moderator talks, others listen until they are given the word. Strangers stay out.

    :param sandbox: a started sandbox, in which alice and bob are registered.
    """

    def __init__(self, sandbox: Sandbox, report: StepReport) -> None:
        self._sandbox = sandbox
        self._report = report
        self._room = sandbox.homeserver.create_room("alice", joined=("bob",))
        self._call = Observer(sandbox, self._room)
        self._bob: Participant

    async def run(self) -> None:
        """Run all steps. :raises StepFailed: one failed."""
        step = self._report.step
        self._report.section("Members and moderators", "Synapse's module tells the guard of each change.")
        await step("erin, who is not in the room, is refused", self._refused("erin", NOT_A_MEMBER))
        await step("only moderators may talk: bob joins and listens", self._listens())
        await step("bob becomes a moderator: he may talk", self._promoted())
        await step("alice bans bob: he is out of the call", self._banned())
        await step("bob comes back with the token he still has", self._comes_back())
        await step("bob asks for a new token", self._refused("bob", NOT_A_MEMBER))

    async def _refused(self, name: str, expected: str) -> str:
        answer = await self._sandbox.ask_token(f"@{name}:{SERVER_NAME}", self._room)
        text = f"{answer.code} {json.loads(answer.body).get('error', 'and a token')}"
        expect(text == expected, f"answered {text}")
        return text

    async def _listens(self) -> str:
        permissions = {"microphone": MODERATOR, "camera": MODERATOR, "screen_share": MODERATOR}
        self._sandbox.homeserver.set_state(self._room, CALL_PERMISSIONS, permissions)
        await self._push()
        self._bob = await self._sandbox.enter(f"@bob:{SERVER_NAME}", self._room)
        expect(self._bob.publish("MICROPHONE") is None, "the SFU accepts his microphone")
        return f"{CALL_PERMISSIONS} {json.dumps(permissions)}; the SFU refuses his microphone"

    async def _promoted(self) -> str:
        levels: dict[str, Any] = {"users": {f"@alice:{SERVER_NAME}": 100, f"@bob:{SERVER_NAME}": MODERATOR}}
        self._sandbox.homeserver.set_state(self._room, "m.room.power_levels", levels)
        await self._push()
        await self._call.until(lambda: self._bob.publish("MICROPHONE"), "the SFU still refuses his microphone")
        return f"m.room.power_levels: bob has {MODERATOR}; the SFU has his microphone"

    async def _banned(self) -> str:
        self._sandbox.homeserver.ban(self._room, "bob", sender="alice")
        await self._push("bob")
        await self._call.until(lambda: not self._bob.connected, "he is still in the call")
        return "removed by the guard: not_a_member"

    async def _comes_back(self) -> str:
        again = self._sandbox.livekit.connect(self._bob.refreshed_token())
        await self._call.until(lambda: not again.connected, "he is still in the call")
        return "LiveKit cannot revoke a token, so the guard removes him each time"

    async def _push(self, name: str = "") -> None:
        """What the Synapse module does."""
        content = {"room_id": self._room} | ({"user": f"@{name}:{SERVER_NAME}"} if name else {})
        answer = await self._sandbox.operator("POST", "/policy-changed", json.dumps(content).encode())
        expect(answer.code == 202, f"/policy-changed answers {answer.code}")
