# SPDX-License-Identifier: Apache-2.0
"""A lobby in memory, and a stand-in for the guard's account in rooms: what it sent, and reactions to it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock, deferLater

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.guard.lobby import Lobby, MemoryEntries
from lotusguard.guard.rooms.voice import Reaction
from lotusguard.metrics import Metrics

T = TypeVar("T")


def lobby_on(clock: Clock, metrics: Metrics | None = None, longest_wait: float = 600.0) -> Lobby:
    """A lobby that is kept in memory only."""
    entries = MemoryEntries(None, clock, clock.seconds, longest_wait)
    return Lobby(entries, clock, clock.seconds, metrics or Metrics(), longest_wait)


def now(work: Coroutine[Any, Any, T]) -> T:
    """The result of work that has nothing to wait for."""
    results: list[T] = []
    Deferred.fromCoroutine(work).addCallback(results.append)
    (result,) = results
    return result


@define(eq=False)
class FakeVoice:
    """Implements `lotusguard.guard.rooms.voice.RoomVoice`.

    :ivar resident: whether the account is in every room. :ivar failing: whether the homeserver takes nothing.
    :ivar seconds: how long sending a notice takes, on the clock.
    :ivar unexpected: raised instead of what the protocol allows.
    :ivar answers_lost: whether the homeserver takes notices, and its answers are lost.
    :ivar transactions: event IDs of notices: one that is sent again is the same event.
    """

    resident: bool = True
    failing: bool = False
    notices: list[tuple[str, str, str]] = field(factory=list)
    reactions: list[tuple[str, str]] = field(factory=list)
    redacted: list[str] = field(factory=list)
    listeners: list[Callable[[Reaction], None]] = field(factory=list)
    seconds: float = 0.0
    answers_lost: bool = False
    unexpected: Exception | None = None
    transactions: dict[str, str] = field(factory=dict)
    clock: IReactorTime = field(factory=Clock)

    def can_speak(self, room_id: str) -> bool:
        return self.resident

    def is_heard_from(self, room_id: str) -> bool:
        return self.resident

    async def notice(self, room_id: str, text: str, transaction: str = "") -> str:
        self._fail()
        if self.seconds:
            await deferLater(self.clock, self.seconds)
        if transaction not in self.transactions:
            self.transactions[transaction] = f"${len(self.notices)}"
            self.notices.append((room_id, self.transactions[transaction], text))
        if self.answers_lost:
            raise DependencyFailed("synapse", "timeout")
        return self.transactions[transaction]

    async def react(self, room_id: str, event_id: str, key: str, transaction: str = "") -> None:
        self._fail()
        self.reactions.append((event_id, key))

    async def redact(self, room_id: str, event_id: str) -> None:
        self._fail()
        self.redacted.append(event_id)

    def on_reaction(self, listener: Callable[[Reaction], None]) -> None:
        self.listeners.append(listener)

    def hear(self, sender: str, key: str, number: int = 0, room_id: str = "", event_id: str = "") -> None:
        """Somebody reacts to the notice of that number."""
        given, notice, _ = self.notices[number]
        for listener in self.listeners:
            listener(Reaction(room_id or given, sender, event_id or notice, key))

    def _fail(self) -> None:
        if self.unexpected is not None:
            raise self.unexpected
        if self.failing:
            raise DependencyFailed("synapse", "timeout")
