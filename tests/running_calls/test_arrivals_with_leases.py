# SPDX-License-Identifier: Apache-2.0
"""An arrival in a large call at a guard whose lease has gone to another one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from attrs import define, field
from twisted.internet.task import Clock

from lotusguard.guard.calls.enforcement import LARGE_CALL, Enforcement
from lotusguard.guard.calls.failing import FailingCalls
from lotusguard.guard.seats.registry import Slot
from lotusguard.metrics import Metrics

LARGE, UNKNOWN = "large", "unknown"


@define(eq=False)
class Lost:
    """Leases that another guard has. :ivar asked: SFU rooms that its guard is to enforce at once."""

    asked: list[str] = field(factory=list)

    async def acquire(self, room_id: str) -> bool:
        return False

    async def confirms(self, room_id: str) -> bool:
        return False

    async def ask_holder(self, alias: str) -> None:
        self.asked.append(alias)


class Registry:
    async def slot_of(self, alias: str) -> Slot | None:
        return None if alias == UNKNOWN else Slot("!room", "m.call#ROOM")


def enforcement_of(leases: Lost) -> Enforcement:
    nothing = cast(Any, SimpleNamespace(forget=lambda alias: None, failing=FailingCalls(Clock(), remembered=60.0)))
    return Enforcement(
        nothing, nothing, cast(Any, Registry()), nothing, nothing, nothing, nothing, Clock(), Metrics(), 1.0, leases
    )  # fmt: skip


def test_the_holder_of_the_lease_is_told_about_an_arrival_in_a_large_call() -> None:
    leases = Lost()
    enforcement = enforcement_of(leases)
    enforcement.watched[LARGE] = LARGE_CALL + 1
    enforcement.enforce_arrival(LARGE, "identity")
    assert leases.asked == [LARGE]


def test_the_holder_is_told_only_about_what_is_urgent() -> None:
    leases = Lost()
    enforcement = enforcement_of(leases)
    enforcement.enforce(LARGE, urgent=False)
    assert not leases.asked
    enforcement.enforce(LARGE)
    enforcement.enforce(UNKNOWN)
    enforcement.enforce(LARGE, urgent=False)
    assert leases.asked == [LARGE]
