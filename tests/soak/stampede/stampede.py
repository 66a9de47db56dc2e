# SPDX-License-Identifier: Apache-2.0
"""The rounds of a stampede: in each, many people want to join one room at once, through all guards."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from attrs import define, field

from benchmarks.prepared_answers import SERVER_NAME, cached_alias
from tests.soak.stampede.callers import Answered, Caller, in_turns
from tests.soak.stampede.guards import GuardUnderStampede, Valkey, environment
from tests.soak.stampede.world import Sfu, World

Say = Callable[[str], None]
RECONCILE = 3.0
TOLD_ABOVE = 1.0
"""Seconds above which each time that a call has more people than seats is printed."""
SETTLED = 25.0
"""Seconds after which everybody is in who can be: a hold whose token was lost with its guard ends after the seat's
time to arrive."""
SEAT_TTL = 8.0
AFTER_FAULT = 12.0
"""Seconds for which a fault may have consequences: another guard takes over a room within 10 s."""


@define(eq=False)
class Stampede:
    """:ivar outages: from when to when something was down.
    :ivar faults: the same, until all guards knew again who holds the seats.
    """

    directory: Path
    guards_count: int
    joins: int
    seats: int
    at_once: int
    dice: Random
    say: Say
    patient: bool = False
    counts: Counter[str] = field(init=False, factory=Counter)
    faults: list[tuple[float, float]] = field(init=False, factory=list)
    outages: list[tuple[float, float]] = field(init=False, factory=list)
    seconds: list[float] = field(init=False, factory=list)
    sfu: Sfu = field(init=False)
    valkey: Valkey = field(init=False)
    guards: list[GuardUnderStampede] = field(init=False, factory=list)
    callers: list[Caller] = field(init=False, factory=list)
    _hooks: set[asyncio.Task[None]] = field(init=False, factory=set)
    _round: int = field(init=False, default=0)

    async def start(self, **settings: str) -> None:
        self.sfu = Sfu(self.seats)
        self.sfu.tell = self._webhook
        ports = await World(self.sfu).start()
        self.valkey = Valkey(self.directory / "valkey")
        self.valkey.start()
        own = {"GUARD_SEAT_TTL": str(SEAT_TTL), "GUARD_RECONCILE_INTERVAL": str(RECONCILE)}
        told = environment(ports, self.valkey.port, **own | settings)
        for number in range(self.guards_count):
            self.guards.append(GuardUnderStampede(self.directory / f"guard{number + 1}", told, self.patient))
        for guard in self.guards:
            guard.start()
        for guard in self.guards:
            await guard.answers()
        self.callers = [Caller() for _ in range(self.at_once)]

    def stop(self) -> None:
        for caller in self.callers:
            caller.close()
        for guard in self.guards:
            guard.end()
        self.valkey.kill()

    def _webhook(self, body: bytes, headers: dict[str, str]) -> None:
        """LiveKit sends to one address, and tries again if there is no answer."""

        async def send() -> None:
            caller = Caller()
            for _ in range(4):
                code, _ = await caller.post(self._any_port(), "/sfu_webhook", body, headers)
                if code == 200:
                    break
                await asyncio.sleep(1.0)
            caller.close()

        task = asyncio.ensure_future(send())
        self._hooks.add(task)
        task.add_done_callback(self._hooks.discard)

    def _any_port(self) -> int:
        """As a proxy with passive health checks: a guard that runs, if there is one."""
        running = [guard for guard in self.guards if guard.runs] or self.guards
        return self.dice.choice(running).port

    # -- the first run: nothing fails --------------------------------------------------------------------

    async def exact_round(self) -> bool:
        """:return: whether exactly as many tokens were issued as there are seats."""
        self._round += 1
        room, began = f"!{self._round}:{SERVER_NAME}", time.monotonic()

        async def join(caller: Caller, number: int) -> int:
            guard = self.guards[number % len(self.guards)]
            return (await caller.ask(guard.port, room, f"@u{number}:{SERVER_NAME}")).code

        codes = Counter(await in_turns(self.callers, range(self.joins), join))
        self.seconds.append(time.monotonic() - began)
        right = codes == {200: self.seats, 403: self.joins - self.seats}
        self.counts["exact" if right else "wrong"] += 1
        if not right or self._round % 10 == 0:
            self.say(f"round {self._round}: {dict(codes)} in {self.seconds[-1]:.1f} s")
        return right

    # -- the second run: guards and Valkey are killed ----------------------------------------------------

    async def round_with_faults(self) -> None:
        self._round += 1
        room = f"!{self._round}:{SERVER_NAME}"
        alias = cached_alias(room)
        fault = asyncio.ensure_future(self._fault())
        joining = in_turns(self.callers, range(self.joins), lambda caller, number: self._enter(caller, room, number))
        self.counts.update(await joining)
        await fault
        await self._fill(room, alias)
        for identity in list(self.sfu.rooms.get(alias, ())):
            self.sfu.leave(alias, identity)
        self.sfu.rooms.pop(alias, None)

    async def _enter(self, caller: Caller, room: str, number: int) -> str:
        """Ask until there is an answer, and enter."""
        user = f"@u{number}:{SERVER_NAME}"
        for _ in range(60):
            answered: Answered = await caller.ask(self._any_port(), room, user)
            if answered.code == 200:
                await asyncio.sleep(self.dice.uniform(0.0, 1.0))
                self.sfu.connect(answered.token)
                return "entered"
            if answered.code == 403:
                return "refused"
            await asyncio.sleep(self.dice.uniform(0.1, 0.5))
        return "gave up"

    async def _fill(self, room: str, alias: str) -> None:
        """New people get every seat that is left, and no more than that."""
        end = time.monotonic() + AFTER_FAULT + SETTLED
        number = self.joins
        while len(self.sfu.users(alias)) != self.seats and time.monotonic() < end:
            if len(self.sfu.users(alias)) < self.seats:
                number += 1
                await self._enter(self.callers[0], room, number)
            await asyncio.sleep(0.3)
        present = len(self.sfu.users(alias))
        if present != self.seats:
            self.counts["false refusals after recovery" if present < self.seats else "rooms over the limit"] += 1
            self.say(f"round {self._round}: {present} of {self.seats} seats are used in the end")
        else:
            self.counts["rooms full in the end"] += 1
        for guard in self.guards:
            answered = await self.callers[0].ask(guard.port, room, f"@late:{SERVER_NAME}")
            self.counts["let in beside a full call" if answered.code == 200 else "refused at a full call"] += 1

    async def _fault(self) -> None:
        """Kill a guard, or Valkey, in the middle of the stampede, and start it again.

        It is over when all guards answer, and say that they know who holds the seats.
        """
        await asyncio.sleep(self.dice.uniform(0.0, 2.0))
        kind = self.dice.choice(("guard", "two guards", "valkey empty", "valkey old", "valkey as it was", "both"))
        self.counts[f"killed: {kind}"] += 1
        began = time.monotonic()
        killed: list[GuardUnderStampede] = []
        if kind in ("guard", "two guards", "both"):
            killed = self.dice.sample(self.guards, 2 if kind == "two guards" and len(self.guards) > 2 else 1)
            for guard in killed:
                guard.kill()
        if kind.startswith("valkey") or kind == "both":
            await self._restart_valkey(kind)
        await asyncio.sleep(self.dice.uniform(0.0, 3.0))
        for guard in killed:
            guard.start()
        for guard in killed:
            await guard.listens()
        back = time.monotonic()
        self.outages.append((began, back))
        for guard in self.guards:
            await guard.answers()
        self.faults.append((began, time.monotonic()))
        ended = self.faults[-1][1]
        self.say(f"round {self._round}: {kind}, from {began:.1f} to {ended:.1f}, all run since {back:.1f}")

    async def _restart_valkey(self, kind: str) -> None:
        if kind == "valkey empty":
            self.valkey.forget()
        else:
            self.valkey.save()
            if kind == "valkey old":
                await asyncio.sleep(self.dice.uniform(0.5, 1.5))
        self.valkey.kill()
        await asyncio.sleep(self.dice.uniform(0.0, 2.0))
        await asyncio.get_running_loop().run_in_executor(None, self.valkey.start)

    def overflows(self, faults: Sequence[tuple[float, float]]) -> list[float]:
        """How long, in seconds, more people were in a call than it has seats, each time.

        :param faults: times from when to when that do not count.
        """
        ended = [*self.sfu.ended, *((alias, since, time.monotonic()) for alias, since in self.sfu.over.items())]
        for alias, since, until in ended:
            if _longest_outside(faults, since, until) > TOLD_ABOVE:
                self.say(f"too many in {alias[:8]} from {since:.1f} to {until:.1f}")
        return sorted(_longest_outside(faults, since, until) for _, since, until in ended)


def _longest_outside(faults: Sequence[tuple[float, float]], since: float, until: float) -> float:
    """The longest time between two faults. Another fault may begin before the consequences of one are over."""
    longest = 0.0
    for began, ended in sorted(faults):
        longest = max(longest, min(began, until) - since)
        since = max(since, ended)
    return max(longest, until - since)


async def repeat(rounds: int, seconds: float, work: Callable[[], Any]) -> None:
    """Begin no round after so many seconds."""
    end = time.monotonic() + seconds
    for _ in range(rounds):
        if time.monotonic() > end:
            break
        await work()
