# SPDX-License-Identifier: Apache-2.0
"""A guard process that listens in rooms is killed; another one replaces it within ten seconds.

Starting processes takes long: this runs only if ``KILLED_GUARD`` is set in the environment.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater

from tests.calls import ALICE, BOB, room_of
from tests.conftest import until
from tests.guardprocess import GuardProcess, ProcessSandbox
from tests.lobby.test_joining import asking
from tests.lobby.test_resident import answers, asked_about, notice_about
from tests.residence.helpers import GUARD, notices

from .conftest import OwnServer

pytestmark = pytest.mark.skipif("KILLED_GUARD" not in os.environ, reason="takes long; set KILLED_GUARD")
clock: Any = reactor


class TwoProcesses(ProcessSandbox):
    """Two guard processes. Clients and operators use the one that was started last."""

    others: tuple[GuardProcess, ...] = ()

    def guard_settings(self) -> dict[str, object]:
        if not hasattr(self, "guard_token"):
            self.guard_token = self.homeserver.add_user("guard")
        return {**super().guard_settings(), "matrix_token": self.guard_token}

    async def start_another(self) -> None:
        self.others = (*self.others, self.process)
        del self.port
        await self.start_guard()

    async def sync(self) -> str:
        rooms: dict[str, str] = json.loads((await self.request("GET", f"{self.admin_url}/readyz")).body)["rooms"]
        return rooms["sync"]

    async def stop(self) -> None:
        for process in self.others:
            if not process.ended.called:
                process.signal("KILL")
                await process.ended
        await super().stop()


@pytest_twisted.ensureDeferred
async def test_a_killed_guard_is_replaced_within_ten_seconds_and_nothing_is_said_twice(own_server: OwnServer) -> None:
    sandbox = TwoProcesses(reactor, guard_redis_url=own_server.url, guard_admin_token="")
    await sandbox.start()
    try:
        room_id = room_of(sandbox)
        sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": True})
        sandbox.homeserver.invite(room_id, GUARD, sender=ALICE)
        while await sandbox.sync() != "alive":
            await deferLater(clock, 0.1)
        await sandbox.start_another()
        while await sandbox.sync() != "following":
            await deferLater(clock, 0.1)
        await deferLater(clock, 2)
        answer = asking(sandbox, BOB, room_id)
        event_id = await asked_about(sandbox, room_id, BOB)
        sandbox.homeserver.send_message(room_id, ALICE, "!call")
        await until(lambda: answers(sandbox, room_id))
        killed_at = clock.seconds()
        sandbox.others[0].signal("KILL")
        sandbox.homeserver.react(room_id, ALICE, event_id, "✅")  # heard by the one that takes over
        assert (await answer).code == 200
        assert clock.seconds() - killed_at < 10
        await until(lambda: not notice_about(sandbox, room_id, BOB))
        assert len(answers(sandbox, room_id)) == 1
        assert len(notices(sandbox, room_id)) == 1
    finally:
        await sandbox.stop()
