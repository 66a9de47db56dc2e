# SPDX-License-Identifier: Apache-2.0
"""The guard as operators run it: a `twistd` process in front of the stand-ins, which tests kill and restart."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from lotusguard.sandbox.demo.sandbox import Sandbox

CHECKOUT = Path(__file__).parent.parent
TWISTD = "from twisted.scripts.twistd import run; run()"
TWIST = "from twisted.application.twist._twist import Twist; Twist.main()"
PATIENT = "from lotusguard.guard.seats import writer; writer.PATIENCE = 60.0; "
"""On a slow disk a join goes on before its hold is written, and a kill may lose it. Tests do not depend on the disk."""
WARNINGS = "error,ignore:'spwd' is deprecated:DeprecationWarning"
"""Twisted 26 imports ``spwd`` with Python 3.11 and 3.12, unless it knows already which plugins there are."""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class GuardProcess(ProcessProtocol):
    """One run of ``twistd -n lotusguard``.

    :ivar output: what it has printed so far.
    :ivar ended: fires with how it ended: a signal's name, or an exit status.
    """

    def __init__(self) -> None:
        self.output = ""
        self.ended: Deferred[int | str] = Deferred()

    def outReceived(self, data: bytes) -> None:
        self.output += data.decode("utf-8", "replace")

    errReceived = outReceived

    def processEnded(self, reason: Failure) -> None:
        value = reason.value
        assert isinstance(value, ProcessDone | ProcessTerminated)
        killed = getattr(value, "signal", None)
        self.ended.callback(signal.Signals(killed).name if killed else value.exitCode)

    def signal(self, name: str) -> None:
        """Send it a signal: ``KILL``, ``TERM``."""
        assert self.transport is not None
        self.transport.signalProcess(name)


class ProcessSandbox(Sandbox):
    """A sandbox whose guard is a process of its own, listening on the same port each time it is started."""

    twistd: Sequence[str] = ("-n", "--pidfile=")
    """``twistd``'s own options."""
    program = PATIENT + TWISTD

    async def start_guard(self, **settings: Any) -> None:
        """Start the process and wait until it listens."""
        if not hasattr(self, "port"):
            self.port, self.admin_port = free_port(), free_port()
        self.url, self.admin_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        ports = {"guard_bind_port": self.port, "guard_admin_port": self.admin_port}
        values = {"guard_lookup_timeout": 60} | self.guard_settings() | ports | settings
        environment = {name.upper(): str(value) for name, value in values.items()}
        environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": WARNINGS}
        self.process = GuardProcess()
        arguments = [sys.executable, "-c", self.program, *self.twistd, "lotusguard"]
        reactor.spawnProcess(self.process, sys.executable, arguments, environment)
        self.livekit.webhooks.urls[:] = [f"{self.url}/sfu_webhook"]
        listeners = ("public listener listens", "operators' listener listens")
        while ("-n" in self.twistd or self.program.endswith(TWIST)) and not all(
            said in self.process.output for said in listeners
        ):
            assert not self.process.ended.called, self.process.output
            await deferLater(reactor, 0.01)

    async def end(self, name: str) -> int | str:
        """Send the guard a signal and wait until it has ended. :return: as `GuardProcess.ended`."""
        self.process.signal(name)
        return await self.process.ended

    async def stop(self) -> None:
        """Stop everything; the guard by force if it still runs."""
        if not self.process.ended.called:
            await self.end("KILL")
        await self.stop_dependencies()
