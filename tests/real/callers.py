# SPDX-License-Identifier: Apache-2.0
"""Media clients that the tests control: `participant` in a process of its own. Tests."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from attrs import frozen

from tests.real.processes import eventually


class Refused(Exception):
    """LiveKit refused something; the text is the SDK's."""


class MediaClients:
    """One process with many participants."""

    def __init__(self, output: Path) -> None:
        with output.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("participant.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._numbers = itertools.count()
        self._told: dict[int, dict[str, Any]] = {}
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                told = json.loads(line)
            except ValueError:
                continue  # the SDK's native half prints now and then
            with self._news:
                self._told[told["id"]] = told
                self._news.notify_all()

    def tell(self, do: str, **what: Any) -> Any:
        """One command and its answer. :raises Refused:"""
        return self.told(self.begin(do, **what))

    def begin(self, do: str, **what: Any) -> int:
        """Begin a command; `told` waits for its answer."""
        number = next(self._numbers)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "do": do, **what}).encode() + b"\n")
        self._process.stdin.flush()
        return number

    def told(self, number: int, seconds: float = 40.0) -> Any:
        with self._news:
            assert self._news.wait_for(lambda: number in self._told, seconds), "the media clients do not answer"
            told = self._told.pop(number)
        assert "error" not in told, told["error"]
        if "refused" in told:
            raise Refused(told["refused"])
        return told["told"]

    def signal(self, how: signal.Signals) -> None:
        """Kill or stop the process of the clients."""
        self._process.send_signal(how)

    def kill(self) -> None:
        """End the process at once: its participants do not leave their calls first."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5.0)
        self._process.stdout.close()


@frozen
class Call:
    """One participant in a call, as their own client sees it.

    :ivar connected_at: in seconds since the epoch.
    """

    clients: MediaClients
    who: str
    connected_at: float

    def look(self) -> dict[str, Any]:
        seen: dict[str, Any] = self.clients.tell("look", who=self.who)
        return seen

    @property
    def identity(self) -> str:
        return str(self.look()["identity"])

    def tracks_of(self, other: Call) -> list[str]:
        """Sources of another participant's live tracks, as announced here. (The SDK does not tell the publisher.)"""
        return list(self.look()["others"].get(other.identity, ()))

    @property
    def ended(self) -> str | None:
        """Why the participant is no longer in the call; ``None`` while they are."""
        reason: str | None = self.look()["ended"]
        return reason

    def frames(self, other: Call, source: str) -> int:
        """How many frames of another participant's track have arrived here."""
        return int(self.look()["frames"].get(f"{other.identity}/{source}", 0))

    def hears(self, other: Call, source: str, seconds: float = 10.0) -> None:
        """Wait until new frames of another participant's track arrive."""
        before = self.frames(other, source)
        eventually(lambda: self.frames(other, source) > before + 5, seconds, f"{source} of {other.who}")

    def may_publish(self, source: str) -> bool:
        """Whether the client believes that it may publish a source."""
        return source in self.look()["may_publish"]

    def removed(self, seconds: float = 10.0) -> float:
        """Wait until a moderator's action ends the session. :return: when that was."""
        assert eventually(lambda: self.ended, seconds, f"the removal of {self.who}") == "PARTICIPANT_REMOVED"
        return float(self.look()["ended_at"])

    def publish(self, source: str, **how: Any) -> None:
        """:raises Refused:"""
        self.clients.tell("publish", who=self.who, source=source, **how)

    def cannot_publish(self, source: str) -> None:
        """Try to publish a source that must be refused. LiveKit sends no refusal: the SDK waits until its timeout."""
        try:
            self.publish(source, patience=1.5)
        except Refused:
            return
        raise AssertionError(f"{self.who} could publish {source}")

    def leave(self) -> None:
        self.clients.tell("leave", who=self.who)
