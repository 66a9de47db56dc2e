# SPDX-License-Identifier: Apache-2.0
"""What this guard issued a short time ago: it gives that back to a Redis that may have lost it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from attrs import define, field, frozen
from twisted.internet.interfaces import IReactorTime

from lotusguard.guard.seats.book import Issued

ISSUED_KEPT = 50_000


@frozen
class OwnHold:
    """A hold that this guard issued.

    :ivar expires: on the guard's clock.
    :ivar seated: a seat was taken for it in the shared book. Otherwise it gets one only if one is free.
    """

    room_id: str
    user: str
    token: Issued
    expires: float
    seated: bool


@define(eq=False)
class OwnHolds:
    """Holds by ID, until the time to arrive is over."""

    _clock: IReactorTime
    _holds: OrderedDict[str, OwnHold] = field(init=False, factory=OrderedDict)

    def note(self, hold_id: str, hold: OwnHold) -> None:
        self._holds[hold_id] = hold
        now = self._clock.seconds()
        while len(self._holds) > ISSUED_KEPT or next(iter(self._holds.values())).expires <= now:
            self._holds.popitem(last=False)
            if not self._holds:
                break

    def unexpired(self) -> Sequence[tuple[str, OwnHold]]:
        now = self._clock.seconds()
        return [(hold_id, hold) for hold_id, hold in self._holds.items() if hold.expires > now]
