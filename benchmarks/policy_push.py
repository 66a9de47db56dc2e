# SPDX-License-Identifier: Apache-2.0
"""How long a screen share lasts after it is forbidden: from the PUT at a real Synapse to the revoked track.

``python -m benchmarks.policy_push`` prints the figures as JSON and then as a line; milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from attrs import asdict, frozen
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater, react

from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.synapse import Guarded, Synapse, User, free_port

PATIENCE = 10.0
"""Seconds after which a round has failed."""
POLLED = 0.0005
"""Seconds between two checks of the call."""
AN_HOUR = 3600.0
"""Interval of everything else that would notice a change."""


@frozen
class PolicyPushed:
    """The result, in milliseconds.

    :ivar put_median: the part of it until Synapse had answered the PUT.
    """

    rounds: int
    revoked_median: float
    revoked_max: float
    put_median: float

    def __str__(self) -> str:
        return (
            f"policy push: from PUT to revoked track median {self.revoked_median:.0f} ms, max {self.revoked_max:.0f} ms"
            f" of {self.rounds} rounds (PUT answered after {self.put_median:.0f} ms)"
        )


async def one_round(reactor: Any, guarded: Guarded, admin: User) -> tuple[float, float]:
    """A call in a room of its own. :return: seconds until the track was gone, and until the PUT was answered."""
    room_id = await guarded.synapse.create_room(admin)
    participant = await guarded.enter(admin, room_id)
    participant.publish("SCREEN_SHARE")
    began = time.perf_counter()
    answered = 0.0

    async def put() -> None:
        nonlocal answered
        await guarded.synapse.set_state(admin, room_id, "io.lotus.room_quality", {"allow_screenshare": False})
        answered = time.perf_counter() - began

    putting = Deferred.fromCoroutine(put())
    while participant.tracks:
        if time.perf_counter() - began > PATIENCE:
            raise RuntimeError("the track was not revoked")
        await deferLater(reactor, POLLED)
    revoked = time.perf_counter() - began
    await putting
    return revoked, answered


async def measured(reactor: Any, rounds: int) -> PolicyPushed:
    """Start Synapse and a guard, and run the rounds one after the other, after one to warm up."""
    with TemporaryDirectory() as directory:
        synapse = Synapse(Path(directory), guard_port=free_port())
        synapse.start()
        try:
            sandbox = Sandbox(
                reactor,
                synapse_api=synapse.url,
                matrix_token=(await synapse.user("operator", admin=True)).token,
                guard_admin_port=synapse.guard_port,
                guard_policy_ttl=AN_HOUR,
                guard_reconcile_interval=AN_HOUR,
            )
            await sandbox.start()
            try:
                guarded, admin = Guarded(synapse, sandbox), await synapse.user("alice")
                times = [await one_round(reactor, guarded, admin) for _ in range(rounds + 1)][1:]
            finally:
                await sandbox.stop()
        finally:
            synapse.stop()
    revoked, answered = ([seconds * 1000 for seconds in kind] for kind in zip(*times, strict=True))
    return PolicyPushed(rounds, round(median(revoked), 1), round(max(revoked), 1), round(median(answered), 1))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=20)
    rounds = arguments.parse_args().rounds

    async def run(reactor: Any) -> None:
        outcome = await measured(reactor, rounds)
        sys.stdout.write(f"{json.dumps(asdict(outcome))}\n{outcome}\n")

    react(lambda reactor: Deferred.fromCoroutine(run(reactor)))


if __name__ == "__main__":
    main()
