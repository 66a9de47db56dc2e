# SPDX-License-Identifier: Apache-2.0
"""The scenarios with large rooms and many rooms: what a join costs there, and a big event."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Self

from benchmarks.bench import MS, Bench
from benchmarks.figures import percentile
from benchmarks.load import Outcome
from benchmarks.prepared_answers import DEVICE, SERVER_NAME, USERS_A_ROOM, cached_alias, room_id
from benchmarks.processes import GuardProcess
from lotusguard.guard.seats.statefile import open_state_file

SEATS = (10, 1_000, 10_000)
ROOMS = (1, 1_000, 100_000)
AT_ONCE = 1_000
"""Joins of one load: all of them have to be answered before callers lose their patience."""
PEOPLE = 5_000
A_MINUTE = 500
"""People who join the big event, and leave it, in a minute."""
BURST = 20.0
"""Joins a second while the policy of the big event changes."""
SHOWN = (100, 20_000)
"""Rooms in which somebody holds a seat; the second is the most that a guard keeps."""
LOOKED_AT = ("/rooms", "/lobby", "/metrics", "/", "/console/rooms")
NOBODY_RECONCILES = {"GUARD_RECONCILE_INTERVAL": "3600", "GUARD_SEAT_TTL": "3600"}


def room_size(bench: Bench) -> None:
    """CPU per join into rooms in which so many seats are held, by people who ask again."""
    with _growing(bench), ExitStack() as stack:
        guards = {seats: stack.enter_context(GuardProcess(bench.dependencies, NOBODY_RECONCILES)) for seats in SEATS}
        for seats, guard in guards.items():
            for first in range(1, seats - USERS_A_ROOM, AT_ONCE):
                bench.load(guard, 32, min(AT_ONCE, seats - USERS_A_ROOM - first + 1), rooms=1, strangers=first)
        _compare(bench, {f"{seats:,} seats held in the room": guard for seats, guard in guards.items()})


def room_count(bench: Bench) -> None:
    """CPU per join of a guard that remembers the tokens of so many rooms from an earlier run."""
    with _growing(bench), ExitStack() as stack:
        guards = {}
        for rooms in ROOMS:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="bench")))
            _remember_rooms(directory, rooms)
            settings = {**NOBODY_RECONCILES, "GUARD_STATE_DIR": str(directory)}
            guards[f"{rooms:,} rooms known"] = stack.enter_context(GuardProcess(bench.dependencies, settings))
        _compare(bench, guards)


@contextmanager
def _growing(bench: Bench) -> Iterator[None]:
    """One room without a call, and a limit that nobody reaches."""
    bench.dependencies.ask({"rooms": 1, "participants": 0, "cap": 1_000_000})
    yield
    bench.dependencies.ask({"rooms": 50, "participants": 20, "cap": 50})


def _compare(bench: Bench, guards: Mapping[str, GuardProcess]) -> None:
    """Measure the guards in turn; the first is the one that the others are compared with."""
    figures = {name: bench.figure(f"CPU per join, {name}", "ms") for name in guards}
    smallest, *_, largest = guards
    growth = bench.figure(f"CPU per join, {largest}: to {smallest}", "", 1.1)
    for _ in range(bench.rounds + 2):
        for name, guard in guards.items():
            bench.load(guard, 8, 2 * USERS_A_ROOM, rooms=1)  # so that nothing is looked up
            before = guard.cpu()
            bench.load(guard, 8, bench.joins // 2, rooms=1)
            figures[name].guard.append((guard.cpu() - before) / (bench.joins // 2) * MS)
        growth.guard.append(figures[largest].guard[-1] / figures[smallest].guard[-1])
    bench.say(f"{growth.name}: {median(growth.guard):.2f}")


def _remember_rooms(directory: Path, rooms: int, *, held: bool = False) -> None:
    """A state directory as a guard leaves it that issued a token in each of these rooms.

    :param held: whether the token was issued a moment ago, so that a seat is held.
    """
    connection, _ = open_state_file(directory, time.time)
    now = time.time()
    names = [(f"!other{number}:{SERVER_NAME}", f"@other{number}:{SERVER_NAME}") for number in range(rooms)]
    with connection:
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO aliases (alias, room_id, slot_id, seen) VALUES (?, ?, ?, ?)",
            ((cached_alias(room), room, "m.call#ROOM", now) for room, _ in names),
        )
        connection.executemany(
            "INSERT INTO identities (alias, identity, user, device, ceiling, seen) VALUES (?, ?, ?, ?, 15, ?)",
            ((cached_alias(room), f"{user}:{DEVICE}", user, DEVICE, now) for room, user in names),
        )
        if held:
            connection.executemany(
                "INSERT INTO holds (room_id, alias, identity, user, device, present, expires) "
                "VALUES (?, ?, ?, ?, ?, 0, ?)",
                ((room, cached_alias(room), f"{user}:{DEVICE}", user, DEVICE, now + 3600) for room, user in names),
            )
        connection.execute("COMMIT")
    connection.close()


def quiet_call(bench: Bench, seconds: float) -> None:
    """Reconciling one call of 5,000 people in which nothing changes."""
    share = bench.figure(f"reconciling a call of {PEOPLE:,} in which nothing changes: share of a core", "%", digits=1)
    bench.dependencies.ask({"rooms": 1, "participants": PEOPLE, "cap": PEOPLE + 1_000})
    for _ in range(bench.long_rounds):
        with GuardProcess(bench.dependencies) as guard:
            bench.load(guard, 8, 40, rooms=1)  # the guard knows the room
            time.sleep(8)
            before, began = guard.cpu(), time.monotonic()
            time.sleep(seconds)
            share.guard.append((guard.cpu() - before) / (time.monotonic() - began) * 100)
    bench.dependencies.ask({"rooms": 50, "participants": 20, "cap": 50})
    bench.say(f"{share.name}: {median(share.guard):.1f} %")


def many_rooms(bench: Bench) -> None:
    """What operators look at, while somebody holds a seat in each of so many rooms: CPU, and how long a request of
    somebody else waits at most."""
    bench.dependencies.ask({"rooms": 1, "participants": 0})
    for rooms in SHOWN:
        with TemporaryDirectory(prefix="bench") as directory:
            _remember_rooms(Path(directory), rooms, held=True)
            with GuardProcess(bench.dependencies, {**NOBODY_RECONCILES, "GUARD_STATE_DIR": directory}) as guard:
                session = guard.console_session()
                for path in LOOKED_AT:
                    name = f"{path} with seats held in {rooms:,} rooms"
                    cpu = bench.figure(f"{name}: CPU", "ms", digits=0)
                    wait = bench.figure(f"{name}: longest wait of another request", "ms", digits=0)
                    for _ in range(bench.rounds):
                        before = guard.cpu()
                        with LongestWait(guard) as waited:
                            guard.look_at(path, session)
                        cpu.guard.append((guard.cpu() - before) * MS)
                        wait.guard.append(waited.seconds * MS)
                    bench.say(f"{name}: {median(cpu.guard):.0f} ms, another waits {median(wait.guard):.0f} ms at most")
    bench.dependencies.ask({"rooms": 50, "participants": 20})


class LongestWait:
    """Asks a guard for its health all the time, in a thread. :ivar seconds: the longest time until the answer."""

    def __init__(self, guard: GuardProcess) -> None:
        self.seconds = 0.0
        self._guard = guard
        self._over = Event()
        self._thread = Thread(target=self._ask)

    def _ask(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._guard.admin_port, 60)
        while not self._over.wait(0.002):
            began = time.monotonic()
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            self.seconds = max(self.seconds, time.monotonic() - began)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


def big_event(bench: Bench, seconds: float) -> None:
    """One call of 5,000 people, of whom 500 a minute are replaced; webhooks and reconciling are on."""
    name = f"call of {PEOPLE:,}"
    share = bench.figure(f"{name}, {A_MINUTE} joins and departures a minute: share of a core", "%", 40.0, digits=1)
    p99 = bench.figure(f"{name}: p99 of joins", "ms", 50.0, digits=1)
    last = bench.figure(f"{name}: policy change to the last of all revocations", "s", 5.0)
    delays = bench.figure(f"{name}: p99 of {BURST:.0f} joins/s until then", "ms", 100.0, digits=1)
    stranger = 10_000
    for _ in range(bench.long_rounds):
        bench.dependencies.ask({"rooms": 1, "participants": 0, "cap": PEOPLE + 1_000, "forbid": []})
        with GuardProcess(bench.dependencies) as guard:
            bench.dependencies.ask({"event": {"people": PEOPLE, "port": guard.port}})

            def join(rate: float, how_long: float, guard: GuardProcess = guard) -> Outcome:
                nonlocal stranger
                stranger += 10_000
                requests = int(rate * how_long)
                return bench.load(guard, 1, requests, rate=rate, rooms=1, strangers=stranger)

            join(A_MINUTE / 60, 10)  # the guard finds the call and learns who is a member
            before, began = guard.cpu(), time.monotonic()
            outcome = join(A_MINUTE / 60, seconds)
            share.guard.append((guard.cpu() - before) / (time.monotonic() - began) * 100)
            p99.guard.append(percentile(outcome.latencies, 0.99) * MS)
            with ThreadPoolExecutor(1) as pool:
                joins = pool.submit(join, BURST, 6.0)
                time.sleep(0.5)
                last.guard.append(_forbid_sharing(bench, guard))
                delays.guard.append(percentile(joins.result().latencies, 0.99) * MS)
        bench.dependencies.ask({"event": {}})
        bench.say(f"{name}: {share.guard[-1]:.0f} % of a core, p99 {p99.guard[-1]:.0f} ms; all revoked after "
                  f"{last.guard[-1]:.1f} s, p99 {delays.guard[-1]:.0f} ms until then")  # fmt: skip
    bench.dependencies.ask({"rooms": 50, "participants": 20, "cap": 50, "forbid": ["allow_screenshare"]})


def _forbid_sharing(bench: Bench, guard: GuardProcess) -> float:
    """Forbid screen sharing in the room. :return: seconds until it is revoked from everybody."""
    bench.dependencies.ask({"reset": True, "forbid": ["allow_screenshare"]})
    began = time.monotonic()
    guard.operator("/policy-changed", json.dumps({"room_id": room_id(0)}).encode())
    while len(updated := bench.dependencies.ask({})["updated_at"]) < PEOPLE:
        if time.monotonic() > began + 60:
            raise RuntimeError(f"only {len(updated)} of {PEOPLE:,} shares were revoked")
        time.sleep(0.1)
    return float(updated[PEOPLE - 1] - began)
