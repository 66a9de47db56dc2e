# SPDX-License-Identifier: Apache-2.0
"""``lotusguard.socket``: systemd holds the port, and no join is refused while the guard restarts."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from tests.calls import ALICE, BOB, room_of
from tests.conftest import until
from tests.guardprocess import CHECKOUT, TWISTD, GuardProcess

DROP_IN = CHECKOUT / "deploy" / "systemd" / "lotusguard.service.d" / "socket.conf"
ACTIVATED = "import os; os.environ['LISTEN_PID'] = str(os.getpid()); " + TWISTD


class Activated:
    """A guard on sockets that another process holds, started as systemd starts it with the drop-in."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.held = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.held6 = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=1024)
        self.url = f"http://127.0.0.1:{self.held.getsockname()[1]}"
        self.url6 = f"http://[::1]:{self.held6.getsockname()[1]}"
        self.process = GuardProcess()
        self._environment = {
            "PYTHONPATH": str(CHECKOUT),
            "LISTEN_FDS": "2",
            "LISTEN_FDNAMES": "lotusguard.socket:lotusguard.socket",
            "STATE_DIRECTORY": str(folder),
            "GUARD_UPSTREAM": sandbox.upstream.url,
            "GUARD_ADMIN_PORT": "",
            "GUARD_LOOKUP_TIMEOUT": "10",
            "LIVEKIT_API": sandbox.livekit.url,
            "LIVEKIT_KEY": KEY,
            "LIVEKIT_SECRET": SECRET,
            "SYNAPSE_API": sandbox.homeserver.url,
            "MATRIX_TOKEN": sandbox.admin_token,
        }

    async def start(self) -> None:
        """Start it, with the held sockets as descriptors 3 and 4."""
        started = next(line for line in DROP_IN.read_text().splitlines() if line.startswith("ExecStart=/"))
        arguments = shlex.split(started)[1:]
        self.process = GuardProcess()
        reactor.spawnProcess(
            self.process,
            sys.executable,
            [sys.executable, "-c", ACTIVATED, *arguments],
            self._environment,
            childFDs={0: "w", 1: "r", 2: "r", 3: self.held.fileno(), 4: self.held6.fileno()},
        )
        process = self.process
        await until(lambda: process.ended.called or process.output.count("public listener listens") == 2, seconds=60)
        assert not process.ended.called, process.output

    async def end(self) -> int | str:
        """Stop the guard as ``systemctl stop`` does."""
        self.process.signal("TERM")
        return await self.process.ended


@pytest_twisted.async_yield_fixture
async def activated(sandbox: Sandbox, tmp_path: Path) -> AsyncIterator[Activated]:
    guard = Activated(sandbox, tmp_path)
    await guard.start()
    sandbox.url = guard.url
    yield guard
    if not guard.process.ended.called:
        guard.process.signal("KILL")
        await guard.process.ended
    guard.held.close()
    guard.held6.close()


@pytest_twisted.ensureDeferred
async def test_the_guard_serves_on_the_sockets_that_systemd_holds(sandbox: Sandbox, activated: Activated) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    for sandbox.url in (activated.url, activated.url6):
        assert (await sandbox.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_requests_during_a_restart_wait_and_are_answered(sandbox: Sandbox, activated: Activated) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    assert await activated.end() == "SIGTERM", activated.process.output
    asking = [Deferred.fromCoroutine(sandbox.ask_token(user, room_id)) for user in (ALICE, BOB, BOB)]
    await activated.start()
    codes = [(await asked).code for asked in asking]
    assert codes == [200, 403, 403]
