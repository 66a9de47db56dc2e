# SPDX-License-Identifier: Apache-2.0
"""Restarts during a soak: of a guard, and of the Valkey that several guards share."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from attrs import define

from tests.soak.guards import Guards
from tests.soak.users import World

TAKEN_OVER = 10.0
"""Seconds within which other guards take over the rooms of a guard that was killed."""
DOWN = 15.0
"""Seconds for which one of several guards is down at most: the others have its rooms, and nothing is excused."""
VALKEY_DOWN = 10.0
GIVEN_BACK = 5.0
"""Seconds for which guards wait for each other's holds after Redis came back with other data."""


@define
class Restarts:
    """Restarts one thing at a time, as operators, crashes and lost disks do."""

    _world: World
    _guards: Guards

    @property
    def part(self) -> float:
        """The part of all faults that are restarts."""
        return 0.6 if self._guards.several else 0.3

    async def cause(self) -> None:
        """Restart something."""
        dice = self._world.dice
        if self._guards.several and dice.random() < 0.4:
            await self._restart_valkey(dice.choice(("as it was", "with older data", "empty")))
        elif self._guards.several:
            await self._restart_one_of_several(dice.choice((signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)))
        else:
            await self._restart_the_only_guard(dice.choice((signal.SIGTERM, signal.SIGKILL)))

    async def _restart_the_only_guard(self, how: signal.Signals) -> None:
        oracle, guard = self._world.oracle, self._guards.each[0]
        oracle.counts[f"restarts by {how.name}"] += 1
        disturbance = oracle.disturbances.begin("killed" if how is signal.SIGKILL else "guard", self._now)
        self.check_exits(how, [await guard.end(how)])
        await guard.start()
        disturbance.ended = self._now

    async def _restart_one_of_several(self, how: signal.Signals) -> None:
        """The other guards have to take over in time, however long this one is down."""
        world, guard = self._world, self._world.dice.choice(self._guards.each)
        world.oracle.counts[f"restarts of a guard by {how.name}"] += 1
        disturbance = world.oracle.disturbances.begin("guard", self._now)
        self.check_exits(how, [await guard.end(how)])
        disturbance.ended = self._now + (TAKEN_OVER if how is signal.SIGKILL else 0.0)
        await world.pause(0.0, DOWN)
        await guard.start()

    async def _restart_valkey(self, how: str) -> None:
        """Kill Valkey and start it again, with the data it had, or those of a moment before, or none."""
        world, valkey = self._world, self._guards.valkey
        assert valkey is not None
        world.oracle.counts[f"restarts of Valkey {how}"] += 1
        if how == "empty":
            valkey.forget()
        else:
            valkey.save()
        if how == "with older data":
            await world.pause(0.5, 1.5)
        disturbance = world.oracle.disturbances.begin("redis", self._now)
        valkey.kill()
        await world.pause(0.0, VALKEY_DOWN)
        await self._guards.start_valkey()
        disturbance.ended = self._now + GIVEN_BACK

    def check_exits(self, how: signal.Signals, statuses: Sequence[int]) -> None:
        """Judge exit statuses after SIGTERM."""
        if how is signal.SIGTERM:
            wrong = sum(status not in (0, -signal.SIGTERM) for status in statuses)
            self._world.oracle.counts["wrong exits on SIGTERM"] += wrong

    @property
    def _now(self) -> float:
        now: float = self._world.reactor.seconds()
        return now
