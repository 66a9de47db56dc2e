# SPDX-License-Identifier: Apache-2.0
"""Joins per minute and how long they took, over the last hour: for the console's charts."""

from __future__ import annotations

from collections import deque

from attrs import define, field
from twisted.internet.interfaces import IReactorTime

MINUTES_KEPT = 60


@define
class Minute:
    """The joins of one minute. :ivar number: minutes on the guard's clock. :ivar slowest: seconds."""

    number: int
    admitted: int = 0
    refused: int = 0
    slowest: float = 0.0


@define(eq=False)
class JoinHistory:
    """Counts joins by minute."""

    _clock: IReactorTime
    _minutes: deque[Minute] = field(factory=lambda: deque(maxlen=MINUTES_KEPT), init=False)

    def add(self, *, refused: bool, seconds: float) -> None:
        """A join has ended."""
        number = int(self._clock.seconds() // 60)
        if not self._minutes or self._minutes[-1].number != number:
            self._minutes.append(Minute(number))
        minute = self._minutes[-1]
        if refused:
            minute.refused += 1
        else:
            minute.admitted += 1
        minute.slowest = max(minute.slowest, seconds)

    def last_hour(self) -> list[Minute]:
        """One entry for each of the last 60 minutes, the current one last; minutes without joins are empty."""
        now = int(self._clock.seconds() // 60)
        known = {minute.number: minute for minute in self._minutes}
        return [known.get(number, Minute(number)) for number in range(now - MINUTES_KEPT + 1, now + 1)]
