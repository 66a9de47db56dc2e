# SPDX-License-Identifier: Apache-2.0
"""The programs that the tests run on loopback, each ended by its own process ID. Tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPHandler, HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from attrs import define, field


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of loopback that is not in use."""
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def eventually(condition: Callable[[], Any], seconds: float = 10.0, what: str = "the condition") -> Any:
    """Wait until a condition holds that depends on other processes. :return: its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
    return value


@define
class HttpAnswer:
    """An answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def content(self) -> Any:
        return json.loads(self.body)


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_opener: OpenerDirector = build_opener(ProxyHandler({}), HTTPHandler(), _NoRedirects())


def http(
    method: str, url: str, content: Any = None, *, bearer: str = "", timeout: float = 30.0, **headers: str
) -> HttpAnswer:
    """One request with a JSON body, or with these bytes. :raises OSError: there was no answer."""
    body = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
    request = Request(url, body, {"Content-Type": "application/json", **headers}, method=method)
    if bearer:
        request.add_header("Authorization", f"Bearer {bearer}")
    try:
        with _opener.open(request, timeout=timeout) as answer:
            return HttpAnswer(answer.status, dict(answer.headers), answer.read())
    except HTTPError as refused:
        with refused:
            return HttpAnswer(refused.code, dict(refused.headers), refused.read())


@define
class Program:
    """A program, its environment and the file for its output.

    :ivar ready: a URL that answers 200 when the program is ready.
    """

    name: str
    command: Sequence[str | Path]
    environment: Mapping[str, str]
    output: Path
    ready: str
    process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        assert self.process is None, f"{self.name} is running already"
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [str(word) for word in self.command],
                env={**inherited, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.output.parent,
            )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        eventually(self._answers, 60.0, f"{self.name} has to answer at {self.ready}")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended:\n{self.output.read_text(errors='replace')[-4000:]}"
        try:
            return http("GET", self.ready, timeout=2.0).status == 200
        except (URLError, OSError):
            return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the program, if it is running, and wait for its end."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(25.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The program does nothing during the ``with`` block; requests to it wait."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def interrupt(self, times: int = 1) -> None:
        """Ask the program to end, as often as it needs, and do not wait for it."""
        assert self.process is not None
        for _ in range(times):
            self.process.terminate()
            time.sleep(0.2)  # two signals at once are one

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.stop(how)
        self.start()

    def cpu_seconds(self) -> float:
        """Processor time that the program has used so far."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
