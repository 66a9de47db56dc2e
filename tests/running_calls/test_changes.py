# SPDX-License-Identifier: Apache-2.0
"""What a guard does when rooms may have changed, and when it tells other guards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from types import SimpleNamespace
from typing import Any, cast

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.guard.calls.changes import DOUBT_INTERVAL, CallChanges
from lotusguard.metrics import Metrics


@define(eq=False)
class Guard:
    """Stands in for what a changed room is passed on to. :ivar enforced: SFU rooms, in this order."""

    enforced: list[str] = field(factory=list)
    doubts: int = 0
    watched: tuple[str, ...] = ("alias",)

    def enforce(self, alias: str, *, urgent: bool = True) -> None:
        self.enforced.append(alias)

    def stop(self) -> None:
        pass

    def may_exist(self, alias: str) -> bool:
        return False

    async def aliases(self, room_id: str) -> Collection[str]:
        return ["alias"]

    async def aliases_of(self, room_id: str) -> Collection[str]:
        return []

    async def end_waiting(self, room_id: str, user: str) -> None:
        pass

    def forget_freshness(self, *room_and_user: str) -> None:
        pass

    def forget_all_freshness(self) -> None:
        self.doubts += 1

    def pushed(self) -> None:
        pass

    @property
    def memberships(self) -> Guard:
        return self


def changes_of(guard: Guard, clock: Clock, tell: Callable[[str, str, str], Awaitable[None]] | None) -> CallChanges:
    fake, nothing = cast(Any, guard), cast(Any, SimpleNamespace(forget_all_freshness=lambda: None, stop=lambda: None))
    nothing.forget_freshness = guard.forget_freshness
    return CallChanges(
        nothing, fake, fake, fake, fake, nothing, nothing, fake, fake, nothing, clock, Metrics(), tell_others=tell
    )


def test_a_change_is_enforced_before_other_guards_have_been_told() -> None:
    guard, told, answer = Guard(), list[str](), Deferred[None]()

    async def tell(room_id: str, user: str, how: str) -> None:
        told.append(room_id)
        await answer

    changed = Deferred.fromCoroutine(changes_of(guard, Clock(), tell).room_changed("!room"))
    assert guard.enforced == ["alias"]
    assert told == ["!room"]
    assert not changed.called
    answer.callback(None)


def test_connecting_often_reads_everything_again_once_per_interval() -> None:
    guard, clock = Guard(), Clock()
    changes = changes_of(guard, clock, None)
    for _ in range(50):
        changes.anything_may_have_changed()
    assert guard.doubts == 1
    clock.advance(DOUBT_INTERVAL)
    assert guard.doubts == 2, "messages may have been lost since the first time"
    clock.advance(10 * DOUBT_INTERVAL)
    assert guard.doubts == 2
    changes.anything_may_have_changed()
    assert guard.doubts == 3
    assert guard.enforced == 3 * ["alias"]


def test_nothing_is_read_again_after_stopping() -> None:
    guard, clock = Guard(), Clock()
    changes = changes_of(guard, clock, None)
    changes.anything_may_have_changed()
    changes.anything_may_have_changed()
    changes.stop()
    assert not clock.getDelayedCalls()
    changes.anything_may_have_changed()
    assert not clock.getDelayedCalls()
