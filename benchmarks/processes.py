# SPDX-License-Identifier: Apache-2.0
"""The processes of a measurement: on which core they run, what they use, how they are stopped."""

from __future__ import annotations

import compileall
import json
import os
import resource
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from attrs import asdict

from benchmarks.figures import Figure
from benchmarks.load import Load, Outcome
from benchmarks.prepared_answers import KEY, MATRIX_TOKEN, SECRET, SERVER_NAME

_CPUCLOCK_SCHED = 2
"""The kind of clock in Linux's number of another process's CPU clock (``clock_getcpuclockid(3)``)."""
TWISTD = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile="]
ADMIN_TOKEN = "bench-operators"


def cores() -> tuple[set[int], set[int]]:
    """The core for the process that is measured, and the cores for all others."""
    own = sorted(os.sched_getaffinity(0))
    return {own[0]}, set(own[1:]) or {own[0]}


def raise_file_limit() -> None:
    """Allow as many open files as the system permits; child processes inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def compile_guard() -> None:
    """Compile the guard's modules, as pip does when it installs them. Where ``PYTHONDONTWRITEBYTECODE`` is set, each
    start from a checkout would compile them again."""
    for folder in ("lotusguard", "twisted"):
        compileall.compile_dir(Path(__file__).parents[1] / folder, quiet=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Started:
    """A process that ends with the ``with`` block that it was started in."""

    def __init__(
        self, command: list[str], cpus: set[int], env: dict[str, str] | None = None, *, log: Path | None = None
    ) -> None:
        output = subprocess.PIPE if log is None else log.open("ab")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=None if log is None else subprocess.STDOUT,
            env={**os.environ, **(env or {})}, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        if log is not None:
            output.close()  # type: ignore[union-attr]
        os.sched_setaffinity(self.process.pid, cpus)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def cpu(self) -> float:
        """Seconds of user and system time so far, as the scheduler counts them (``/proc`` rounds to 10 ms)."""
        return time.clock_gettime((~self.process.pid << 3) | _CPUCLOCK_SCHED)

    def status(self, field: str) -> int:
        """A number of ``/proc/PID/status``, such as ``VmRSS`` or ``VmHWM`` (kB) or ``Threads``."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise LookupError(field)


class Helper(Started):
    """A process that reads JSON lines and answers each with one."""

    def __init__(self, module: str) -> None:
        super().__init__([sys.executable, "-m", module], cores()[1])
        self.said = self._line()

    def _line(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a helper process of the benchmark ended")
        return json.loads(line)

    def ask(self, content: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(content).encode() + b"\n")
        self.process.stdin.flush()
        return self._line()


class Dependencies(Helper):
    """The stand-ins (see `benchmarks.dependencies`)."""

    def __init__(self) -> None:
        super().__init__("benchmarks.dependencies")
        self.ports: dict[str, int] = self.said

    def environment(self) -> dict[str, str]:
        return {
            "GUARD_UPSTREAM": f"http://127.0.0.1:{self.ports['upstream']}",
            "LIVEKIT_API": f"http://127.0.0.1:{self.ports['livekit']}",
            "SYNAPSE_API": f"http://127.0.0.1:{self.ports['synapse']}",
            "LIVEKIT_KEY": KEY, "LIVEKIT_SECRET": SECRET, "MATRIX_TOKEN": MATRIX_TOKEN,
            "GUARD_SERVER_NAME": SERVER_NAME,
        }  # fmt: skip


class Callers(Helper):
    """The load (see `benchmarks.load`)."""

    def __init__(self) -> None:
        super().__init__("benchmarks.load")

    def make(self, load: Load) -> Outcome:
        return Outcome(**self.ask(asdict(load)))


class Subject(Started):
    """A process that is measured: alone on its core, started and answering.

    :ivar patience: seconds to wait for its first answer.
    :ivar ready: seconds from starting the process to its first answer.
    """

    name = ""
    patience = 120.0

    def __init__(self, dependencies: Dependencies, settings: dict[str, str] | None = None, *, twistd: str = "") -> None:
        self.port = free_port()
        self.admin_port = free_port()
        self._directory = TemporaryDirectory(prefix="bench")
        self.log = Path(self._directory.name) / "log"
        env = {
            **dependencies.environment(), "GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": str(self.port),
            "GUARD_ADMIN_PORT": str(self.admin_port), "GUARD_ADMIN_TOKEN": ADMIN_TOKEN,
            "GUARD_STATE_DIR": self._directory.name, **(settings or {}),
        }  # fmt: skip
        began = time.monotonic()
        super().__init__(self.command(twistd.split()), cores()[0], env, log=self.log)
        while _status(self.port, b"GET /healthz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n") != 200:
            if self.process.poll() is not None or time.monotonic() > began + self.patience:
                raise RuntimeError(f"{self.name} does not answer:\n{self.log.read_text()}")
            time.sleep(0.005)
        self.ready = time.monotonic() - began

    def command(self, twistd: list[str]) -> list[str]:
        raise NotImplementedError

    def note(self, figure: Figure, value: float) -> None:
        """Record a round of this process."""
        raise NotImplementedError

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._directory.cleanup()

    def operator(self, path: str, body: bytes) -> int | None:
        """A POST to the operators' listener."""
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\nConnection: close\r\n"
        return _status(self.admin_port, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


class GuardProcess(Subject):
    """lotusguard as in production: under ``twistd``, with a state directory."""

    name = "lotusguard"

    def note(self, figure: Figure, value: float) -> None:
        figure.guard.append(value)

    def console_session(self) -> str:
        """Sign in to the console. :return: the cookie."""
        connection = HTTPConnection("127.0.0.1", self.admin_port, 60)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", "/console/sign-in", f"token={ADMIN_TOKEN}", form)
        answer = connection.getresponse()
        return (answer.getheader("Set-Cookie") or "").partition(";")[0]

    def look_at(self, path: str, session: str) -> None:
        """GET something of the operators' listener. :param session: a cookie of the console."""
        connection = HTTPConnection("127.0.0.1", self.admin_port, 60)
        connection.request("GET", path, headers={"Authorization": f"Bearer {ADMIN_TOKEN}", "Cookie": session})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}")

    def command(self, twistd: list[str]) -> list[str]:
        return [*TWISTD, *twistd, "lotusguard"]


class PeerProcess(Subject):
    """The guard with a thread for each connection (see `benchmarks.threaded_guard`)."""

    name = "peer"

    def note(self, figure: Figure, value: float) -> None:
        figure.peer.append(value)

    def command(self, twistd: list[str]) -> list[str]:
        return [sys.executable, "-m", "benchmarks.threaded_guard"]


class RelayProcess(Subject):
    """Twisted's HTTP alone (see `benchmarks.bare_relay`)."""

    name = "bare Twisted relay"

    def note(self, figure: Figure, value: float) -> None:
        figure.relay.append(value)

    def command(self, twistd: list[str]) -> list[str]:
        return [sys.executable, "-m", "benchmarks.bare_relay"]


def _status(port: int, request: bytes) -> int | None:
    """The status of one answer; ``None`` if there is none."""
    try:
        with socket.create_connection(("127.0.0.1", port), 30) as connection:
            connection.sendall(request)
            answer = connection.recv(65536)
    except OSError:
        return None
    return int(answer[9:12]) if answer[:5] == b"HTTP/" else None
