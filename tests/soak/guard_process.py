# SPDX-License-Identifier: Apache-2.0
"""A guard of a soak, in a process of its own: started, stopped, killed and measured; and its log."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from attrs import Factory, define, field
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.web.http_headers import Headers

from lotusguard.clients.http import ConnectionPool, FixedAgent, fetch
from tests.guardprocess import CHECKOUT, TWISTD, free_port

COMMAND = [sys.executable, "-c", TWISTD, "-n", "--pidfile=", "lotusguard"]


class _Process(ProcessProtocol):
    def __init__(self) -> None:
        self.ended: Deferred[int] = Deferred()

    def processEnded(self, reason: Any) -> None:
        status = reason.value
        self.ended.callback(-status.signal if status.signal else status.exitCode)


@define(eq=False)
class GuardUnderSoak:
    """One guard on the same ports each time it is started, as a supervisor would run it.

    :ivar usage: by process id, seconds since its start, descriptors and resident memory (kB), once a second.
    """

    _reactor: Any
    _environment: dict[str, str]
    _directory: Path
    port: int = field(init=False, factory=free_port)
    admin_port: int = field(init=False, factory=free_port)
    usage: dict[int, list[tuple[float, int, int]]] = field(init=False, factory=lambda: defaultdict(list))
    _process: Any = field(init=False, default=None)
    _protocol: _Process = field(init=False, factory=_Process)
    _started: float = field(init=False, default=0.0)

    @property
    def log(self) -> Path:
        return self._directory / "guard.log"

    async def start(self) -> None:
        """Start it and wait until it answers."""
        self._directory.mkdir(exist_ok=True)
        self._protocol = _Process()
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        own = {
            "GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": str(self.port), "GUARD_ADMIN_PORT": str(self.admin_port),
            "GUARD_STATE_DIR": str(self._directory), "GUARD_LOG_FORMAT": "json",
        }  # fmt: skip
        self._process = self._reactor.spawnProcess(
            self._protocol, COMMAND[0], COMMAND, {**os.environ, **self._environment, **own}, str(CHECKOUT),
            childFDs={0: "w", 1: output, 2: output},
        )  # fmt: skip
        os.close(output)
        self._started = self._reactor.seconds()
        url, each_anew = f"http://127.0.0.1:{self.admin_port}", ConnectionPool(self._reactor, at_most=0)
        agent = FixedAgent(self._reactor, url, each_anew)
        for _ in range(600):
            if self._protocol.ended.called:
                break
            try:
                await fetch(agent, b"GET", b"/healthz", Headers(), limit=1 << 16).addTimeout(5, self._reactor)
            except Exception:
                await deferLater(self._reactor, 0.05)
            else:
                return
        raise RuntimeError(f"the guard does not start:\n{self.log.read_text()[-3000:]}")

    async def end(self, how: signal.Signals) -> int:
        """Send a signal and wait for the end. :return: the exit status; negative for a signal."""
        self._process.signalProcess(how.name.removeprefix("SIG"))
        return await self._protocol.ended

    def kill(self) -> None:
        """Kill it if it runs, and wait for nothing."""
        if self._process is not None and self._process.pid:
            self._process.signalProcess("KILL")

    def waited(self) -> float:
        """How long its main thread has waited for a processor so far, in seconds."""
        return seconds_waited(self._process.pid) if self._process is not None and self._process.pid else 0.0

    def measure(self) -> None:
        """Record its open descriptors and its memory."""
        if self._protocol.ended.called or self._process is None or not self._process.pid:
            return
        proc = Path(f"/proc/{self._process.pid}")
        try:
            descriptors = len(list((proc / "fd").iterdir()))
            resident = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS:"))
        except (OSError, StopIteration):
            return
        age = self._reactor.seconds() - self._started
        self.usage[self._process.pid].append((age, descriptors, int(resident.split()[1])))

    def growth(self, warm: float = 15.0) -> tuple[float, int, int, int]:
        """Of the process that lived longest: seconds measured, most descriptors, memory when warm and at the end (kB).

        Both memories are medians, of the first and the last fifth of its time after warming up.
        """
        lived = max(self.usage.values(), key=lambda samples: samples[-1][0])
        samples = [sample for sample in lived if sample[0] > warm] or lived
        fifth = max(1, len(samples) // 5)
        first, last = (sorted(sample[2] for sample in part)[fifth // 2] for part in (samples[:fifth], samples[-fifth:]))
        return samples[-1][0] - samples[0][0], max(sample[1] for sample in lived), first, last

    def descriptors(self) -> int:
        """How many it has open now."""
        self.measure()
        return self.usage[self._process.pid][-1][1]


def seconds_waited(pid: int | str) -> float:
    """How long a process's main thread was ready to run while others ran; 0 where the kernel does not count that."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


@define
class GuardLog:
    """What the guards logged, as far as a soak judges it.

    :ivar unenforced: the checks that could not be enforced, by request ID.
    :ivar fail_open: time, check and reason of each of them.
    :ivar tracebacks: errors that nobody expected; there should be none.
    """

    unenforced: dict[str, list[str]] = Factory(lambda: defaultdict(list))
    fail_open: list[tuple[float, str, str]] = Factory(list)
    tracebacks: list[str] = Factory(list)
    events: Counter[str] = Factory(Counter)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> GuardLog:
        found = cls()
        for line in chain.from_iterable(map(_lines, paths)):
            if line is None:
                continue
            found.events[line["event"]] += 1
            if "traceback" in line or line["level"] == "critical":
                found.tracebacks.append(f"{line['message']}\n{line.get('traceback', '')}")
            if line["event"] == "join" and line["unenforced"]:  # a "fail_open" line is left out if there are too many
                found.unenforced[line["request_id"]] += line["unenforced"]
            at = datetime.fromisoformat(line["time"]).timestamp()
            if line["event"] == "join" and line["reason"] == "stale_policy":  # the homeserver did not answer in time
                found.unenforced[line["request_id"]].append("policy")
                found.fail_open.append((at, "policy", "stale"))
            if line["event"] == "fail_open":
                found.unenforced[line["request_id"]].append(line["check"])
                found.fail_open.append((at, line["check"], line["reason"]))
        return found


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            yield None  # cut off by kill -9
