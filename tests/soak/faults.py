# SPDX-License-Identifier: Apache-2.0
"""The faults of a soak: dependencies answer wrongly, late or not at all; the guard is restarted and killed."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

from attrs import define

from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.standin import StandIn
from tests.soak.guard_process import GuardUnderSoak
from tests.soak.history import RECOVERY
from tests.soak.users import World

FAULTS: tuple[Callable[[], Fault], ...] = (
    Fault.hang, Fault.invalid_response, Fault.truncated, Fault.wrong_types, Fault.close, Fault.late_close,
    Fault.too_large, lambda: Fault.status(500), lambda: Fault.status(503), lambda: Fault.status(404),
    lambda: Fault.delay(0.5),
    lambda: Fault.drip(0.05), lambda: Fault.redirect("http://127.0.0.1:9/"),
)  # fmt: skip
RESTARTS_UNTIL = 0.5
"""The guard is restarted only before this part of the soak is left: its memory is measured afterwards."""


@define
class Faults:
    """Causes one fault after the other, with time to recover in between.

    :param dependencies: the stand-ins by name. :param is_up: raises unless the guard answers.
    """

    _world: World
    _guard: GuardUnderSoak
    _dependencies: dict[str, StandIn]
    _is_up: Callable[[], Awaitable[None]]

    async def cause(self, left: float) -> None:
        """Cause a fault and end it. :param left: the part of the soak that is left, from 1 to 0."""
        world, dice = self._world, self._world.dice
        await world.pause(RECOVERY, RECOVERY * 2)
        if left > RESTARTS_UNTIL and dice.random() < 0.3:
            await self._restart(dice.choice((signal.SIGTERM, signal.SIGKILL)))
            return
        names = dice.sample(sorted(self._dependencies), dice.choice((1, 1, 1, 2)))
        disturbances = [world.oracle.disturbances.begin(name, world.reactor.seconds()) for name in names]
        if dice.random() < 0.25:
            world.oracle.counts["faults: connections refused"] += 1
            for name in names:
                await self._dependencies[name].stop_listening()
        else:
            for name in names:
                fault = self._dependencies[name].fault = dice.choice(FAULTS)()
                world.oracle.counts[f"faults: {fault.kind}"] += 1
        await world.pause(0.5, 4.0)
        for name in names:
            self._dependencies[name].fault = None
            await self._dependencies[name].listen()
        for disturbance in disturbances:
            disturbance.ended = world.reactor.seconds()

    async def _restart(self, how: signal.Signals) -> None:
        oracle, killed = self._world.oracle, how is signal.SIGKILL
        oracle.counts[f"restarts by {how.name}"] += 1
        disturbance = oracle.disturbances.begin("killed" if killed else "guard", self._world.reactor.seconds())
        status = await self._guard.end(how)
        if not killed:
            self.check_exit(status)
        await self._guard.start(self._is_up)
        disturbance.ended = self._world.reactor.seconds()

    def check_exit(self, status: int) -> None:
        """Judge the exit status after SIGTERM."""
        self._world.oracle.counts["wrong exits on SIGTERM"] += status not in (0, -signal.SIGTERM)
