# SPDX-License-Identifier: Apache-2.0
"""The faults of a soak: dependencies answer wrongly, late or not at all; guards and Valkey are restarted and killed."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define

from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.standin import StandIn
from tests.soak.history import RECOVERY
from tests.soak.restarts import Restarts
from tests.soak.users import World

FAULTS: tuple[Callable[[], Fault], ...] = (
    Fault.hang, Fault.invalid_response, Fault.truncated, Fault.wrong_types, Fault.close, Fault.late_close,
    Fault.too_large, lambda: Fault.status(500), lambda: Fault.status(503), lambda: Fault.status(404),
    lambda: Fault.delay(0.5),
    lambda: Fault.drip(0.05), lambda: Fault.redirect("http://127.0.0.1:9/"),
)  # fmt: skip
RESTARTS_UNTIL = 0.5
"""Guards are restarted only before this part of the soak is left: their memory is measured afterwards."""


@define
class Faults:
    """Causes one fault after the other, with time to recover in between.

    :param dependencies: the stand-ins by name.
    """

    _world: World
    _restarts: Restarts
    _dependencies: dict[str, StandIn]

    async def cause(self, left: float) -> None:
        """Cause a fault and end it. :param left: the part of the soak that is left, from 1 to 0."""
        world, dice = self._world, self._world.dice
        await world.pause(RECOVERY, RECOVERY * 2)
        if left > RESTARTS_UNTIL and dice.random() < self._restarts.part:
            await self._restarts.cause()
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
