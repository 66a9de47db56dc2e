# SPDX-License-Identifier: Apache-2.0
"""Values over time, and the faults of a soak: what the guard may have known at some moment. No sockets, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from attrs import Factory, define

T = TypeVar("T")

RECOVERY = 8.0
"""Seconds after a fault in which its consequences are excused: a probe, a round of reconciling, a timeout."""


@define
class History(Generic[T]):
    """A value and all its changes."""

    first: T
    _changes: list[tuple[float, T]] = Factory(list)

    @property
    def current(self) -> T:
        return self._changes[-1][1] if self._changes else self.first

    def change(self, value: T, now: float) -> None:
        self._changes.append((now, value))

    def between(self, start: float, end: float) -> list[T]:
        """The value at ``start``, and those that it was changed to until ``end``."""
        before = [value for at, value in self._changes if at <= start]
        return [before[-1] if before else self.first, *(value for at, value in self._changes if start < at <= end)]

    def true_since(self, condition: Callable[[T], bool], never: float) -> float:
        """Since when a condition has been true without interruption.

        :param never: what to return if it is not true now.
        """
        since = never
        for at, value in reversed(self._changes):
            if not condition(value):
                return since
            since = at
        return 0.0 if condition(self.first) else since


@define(eq=False)
class Disturbance:
    """Something that was done to a guard or a dependency: synapse, livekit, upstream, redis, guard, killed;
    or a lack of processors.

    The only guard is ``killed``; one of several is a ``guard`` like one that is stopped: what it issued is in Redis.
    :ivar ended: may lie ahead, if it is known how long the consequences may last.
    """

    target: str
    began: float
    ended: float | None = None


@define
class Disturbances:
    """All faults of a soak, in the order in which they began."""

    _all: deque[Disturbance] = Factory(deque)

    def begin(self, target: str, now: float) -> Disturbance:
        disturbance = Disturbance(target, now)
        self._all.append(disturbance)
        return disturbance

    def any_between(self, since: float, until: float, *targets: str) -> bool:
        """Whether anything was wrong (with one of these) in that time, or shortly before."""
        return any(
            d.began <= until and (d.ended is None or d.ended >= since - RECOVERY)
            for d in self._all
            if not targets or d.target in targets
        )

    def began_between(self, since: float, until: float, target: str) -> bool:
        return any(d.target == target and since <= d.began <= until for d in self._all)

    def quiet_since(self, now: float) -> float:
        """Since when nothing is wrong; ``now`` while something is."""
        return max((now if d.ended is None else d.ended for d in self._all), default=0.0)

    def oldest_knowledge(self, start: float, now: float, age: float) -> float:
        """How old the room state may be that the guard goes by between ``start`` and ``now``.

        What it knows is at most ``age`` seconds old; while the homeserver is down, the last known value serves.
        """
        oldest = start - age
        for d in reversed(self._all):
            if d.target == "synapse" and d.began <= now and (d.ended is None or d.ended >= oldest - RECOVERY):
                oldest = min(oldest, d.began - age)
        return oldest
