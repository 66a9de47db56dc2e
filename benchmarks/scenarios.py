# SPDX-License-Identifier: Apache-2.0
"""The scenarios: each function measures one and records its figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from threading import Event, Thread

from attrs import define

from benchmarks.figures import Figure, percentile
from benchmarks.load import Load, Outcome
from benchmarks.prepared_answers import BIG_ROOM, USERS_A_ROOM, cached_alias, room_id, user_id
from benchmarks.processes import (
    Callers,
    Dependencies,
    GuardProcess,
    PeerProcess,
    RelayProcess,
    Subject,
    compile_guard,
)
from lotusguard.rules.jwt import read_unverified

MS = 1000.0
UPSTREAM_SECOND = 1.0
CROWD_AIM = 1 / 20
Say = Callable[[str], None]


@define
class Bench:
    """One run of the benchmarks: its helper processes, how thorough it is, and the figures so far."""

    dependencies: Dependencies
    callers: Callers
    rounds: int
    joins: int
    crowd: int
    say: Say
    figures: list[Figure]

    def figure(self, name: str, unit: str, aim: float | None = None, digits: int = 2) -> Figure:
        figure = Figure(name, unit, aim=aim, digits=digits)
        self.figures.append(figure)
        return figure

    def load(self, subject: Subject, callers: int, requests: int, **how: object) -> Outcome:
        """Make a load. :raises RuntimeError: not every caller got a token."""
        outcome = self.callers.make(Load(subject.port, callers, requests, **how))  # type: ignore[arg-type]
        if outcome.statuses != {"200": requests}:
            raise RuntimeError(f"{subject.name}: {outcome.statuses}")
        return outcome


def sources_of(answer: str) -> list[str]:
    """``canPublishSources`` of the token in an answer."""
    claims = read_unverified(json.loads(answer)["jwt"])
    return list(claims["video"].get("canPublishSources", ())) if claims else []


CALLERS = (1, 32, 500)
FIRST, FOLLOWING = "first joins", "following requests"


def joins(bench: Bench) -> None:
    """CPU per join and response times, with limit, sources and membership enforced.

    In a *first join* nothing is known of the user: the guard asks who it is and whether they are a member. In a
    *following request* both are in memory. The bare relay makes as many calls as the guard does.
    """
    rows = {
        (kind, callers): (
            bench.figure(f"CPU per join, {kind}, {callers} callers", "ms"),
            bench.figure(f"p50, {kind}, {callers} callers", "ms", digits=1),
            bench.figure(f"p99, {kind}, {callers} callers", "ms", digits=1),
        )
        for kind in (FOLLOWING, FIRST)
        for callers in CALLERS
    }
    rows[FOLLOWING, 32][0].aim, rows[FIRST, 32][0].aim = 0.5, 1.0
    rows[FOLLOWING, 32][0].relay_aim = rows[FIRST, 32][0].relay_aim = 1.6
    bench.dependencies.ask({"cap": 1_000_000, "rooms": ROOMS_JOINED})
    with (
        GuardProcess(bench.dependencies) as guard,
        PeerProcess(bench.dependencies) as peer,
        RelayProcess(bench.dependencies, {"RELAY_LOOKUPS": "0"}) as relay,
        RelayProcess(bench.dependencies, {"RELAY_LOOKUPS": "2"}) as relay_of_first,
    ):
        for subject in (guard, peer, relay, relay_of_first):
            bench.load(subject, 32, bench.joins // 2, rooms=ROOMS_JOINED)
        stranger = 1
        for number in range(bench.rounds):
            for callers in CALLERS:
                requests = bench.joins // 4 if callers == 1 else bench.joins
                for subject in (guard, peer, relay):
                    figures = rows[FOLLOWING, callers]
                    bench.load(subject, 32, ROOMS_JOINED * USERS_A_ROOM, rooms=ROOMS_JOINED)  # then all are known
                    measured = _measured(bench, subject, callers, requests, strangers=0)
                    _note(figures, subject, measured)
                for subject in (guard, peer, relay_of_first):
                    measured = _measured(bench, subject, callers, requests, strangers=stranger)
                    stranger += requests
                    _note(rows[FIRST, callers], subject, measured)
            next_, first = rows[FOLLOWING, 32][0], rows[FIRST, 32][0]
            bench.say(
                f"round {number + 1}, CPU per join: following {next_.guard[-1]:.2f} ms, first {first.guard[-1]:.2f} "
                f"ms; the peer {next_.peer[-1]:.2f} ms; relays {next_.relay[-1]:.2f} and {first.relay[-1]:.2f} ms"
            )
    bench.dependencies.ask({"cap": 50, "rooms": 50})


ROOMS_JOINED = 10
"""Rooms in `joins`: few, so that nearly every request is of the kind that is measured."""


def _measured(bench: Bench, subject: Subject, callers: int, requests: int, strangers: int) -> tuple[float, ...]:
    before = subject.cpu()
    outcome = bench.load(subject, callers, requests, rooms=ROOMS_JOINED, strangers=strangers)
    used = (subject.cpu() - before) / requests * MS
    if isinstance(subject, GuardProcess) and "screen_share" in sources_of(outcome.sample):
        raise RuntimeError("the guard did not enforce the sources")
    return used, percentile(outcome.latencies, 0.5) * MS, percentile(outcome.latencies, 0.99) * MS


def _note(figures: Sequence[Figure], subject: Subject, measured: Sequence[float]) -> None:
    for figure, value in zip(figures, measured, strict=True):
        if isinstance(subject, GuardProcess):
            figure.guard.append(value)
        elif isinstance(subject, PeerProcess):
            figure.peer.append(value)
        else:
            figure.relay.append(value)


def crowd(bench: Bench) -> None:
    """Many callers at once, each with its own connection; upstream takes a second.

    Callers without an answer count with the time until they gave up.
    """
    name = f"{bench.crowd:,} callers at once"
    succeeded = bench.figure(f"{name}: succeeded", "", digits=0)
    p99 = bench.figure(f"{name}: p99", "s", CROWD_AIM)
    memory = bench.figure(f"{name}: peak memory", "MB", digits=0)
    each = bench.figure(f"{name}: memory for each", "kB", 10.0, digits=1)
    threads = bench.figure(f"{name}: threads", "", digits=0)
    rooms = bench.crowd // USERS_A_ROOM  # each caller is a user of their own
    bench.dependencies.ask({"upstream_delay": UPSTREAM_SECOND, "rooms": rooms})
    for _ in range(max(1, bench.rounds // 2)):
        for kind in (GuardProcess, PeerProcess):
            with kind(bench.dependencies) as subject:
                bench.callers.make(Load(subject.port, 8, 50))  # the policies of the rooms are cached
                watched = Watched(subject)
                idle = subject.status("VmRSS")
                outcome = watched.during(
                    lambda: bench.callers.make(Load(subject.port, bench.crowd, bench.crowd, rooms=rooms))
                )
                unanswered = [outcome.seconds] * (bench.crowd - len(outcome.latencies))
                values = (
                    outcome.statuses.get("200", 0),
                    percentile(outcome.latencies + unanswered, 0.99),
                    subject.status("VmHWM") / 1024,
                    watched.threads,
                )
                if kind is GuardProcess:
                    each.guard.append((subject.status("VmHWM") - idle) / bench.crowd)
                for figure, value in zip((succeeded, p99, memory, threads), values, strict=True):
                    (figure.guard if kind is GuardProcess else figure.peer).append(value)
                bench.say(f"{name}, {subject.name}: {outcome.statuses}, p99 {values[1]:.1f} s")
    bench.dependencies.ask({"upstream_delay": 0.0, "rooms": 50})


class Watched:
    """Counts the threads of a process while something is done to it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.threads = 0

    def during(self, work: Callable[[], Outcome]) -> Outcome:
        done = Event()

        def count() -> None:
            while not done.wait(0.1):
                self.threads = max(self.threads, self.subject.status("Threads"))

        counting = Thread(target=count)
        counting.start()
        try:
            return work()
        finally:
            done.set()
            counting.join()


def hung(bench: Bench) -> None:
    """LiveKit and homeserver accept every request and answer none."""
    first = bench.figure("dependencies hung: slowest of the first 20 joins", "s", None)
    later = bench.figure("dependencies hung: later joins, p50", "ms", None, digits=1)
    added = bench.figure("dependencies hung: later joins' p50 over normal", "ms", 50.0, digits=1)
    first.aim = 1.6  # GUARD_LOOKUP_TIMEOUT, and what a join takes anyway
    for _ in range(max(1, bench.rounds // 2)):
        with GuardProcess(bench.dependencies) as guard:
            bench.load(guard, 4, 200)
            normal = percentile(bench.load(guard, 1, 100).latencies, 0.5) * MS
            bench.dependencies.ask({"hang": True})
            first.guard.append(max(bench.load(guard, 20, 20, first=1000, rooms=20).latencies))
            waited = percentile(bench.load(guard, 1, 100, first=2000, rooms=20).latencies, 0.5) * MS
            bench.dependencies.ask({"hang": False})
        later.guard.append(waited)
        added.guard.append(max(0.0, waited - normal))
    bench.say(f"dependencies hung: first joins {median(first.guard):.2f} s, later {median(later.guard):.1f} ms")
    with PeerProcess(bench.dependencies) as peer:
        bench.dependencies.ask({"hang": True})
        slow = bench.load(peer, 4, 8, first=1000, rooms=8)
        bench.dependencies.ask({"hang": False})
    bench.say(f"dependencies hung: the peer's joins {percentile(slow.latencies, 0.5):.1f} s, first and later")
    bench.figure("dependencies hung: the peer's joins, every one", "s").peer.append(percentile(slow.latencies, 0.5))


def big_room(bench: Bench) -> None:
    """The first join in rooms with 10,000 members, before the policy is in memory."""
    for honours in (True, False):
        name = f"10,000 members, homeserver {'honours' if honours else 'ignores'} type"
        size = bench.figure(f"{name}: policy lookup", "kB", digits=1)
        waited = bench.figure(f"{name}: first join", "ms", digits=1)
        bench.dependencies.ask({"honour_type": honours})
        for kind in (GuardProcess, PeerProcess):
            with kind(bench.dependencies) as subject:
                bench.load(subject, 1, 50)
                for number in range(max(2, bench.rounds)):
                    bench.dependencies.ask({"reset": True})
                    outcome = bench.load(subject, 1, 1, room=BIG_ROOM, first=number, rooms=1)
                    answer = bench.dependencies.ask({})
                    (size.guard if kind is GuardProcess else size.peer).append(answer["bytes"]["synapse"] / 1000)
                    (waited.guard if kind is GuardProcess else waited.peer).append(outcome.latencies[0] * MS)
        bench.say(
            f"{name}: {median(size.guard):.1f} kB, {median(waited.guard):.0f} ms (peer {median(waited.peer):.0f})"
        )
    bench.dependencies.ask({"honour_type": True})


def reconciling(bench: Bench, seconds: float) -> None:
    """300 rooms of 20 people, all with a policy, and 50 joins per second."""
    share = bench.figure("reconciling 300 rooms of 20: share of a core", "%", 25.0, digits=1)
    p99 = {
        interval: bench.figure(f"p99 of 50 joins/s, {label} reconciling 300 rooms", "ms", digits=1)
        for interval, label in (("3600", "without"), ("3", "while"))
    }
    bench.dependencies.ask({"rooms": 300})
    for _ in range(max(1, bench.rounds // 2)):
        for interval, figure in p99.items():
            with GuardProcess(bench.dependencies, {"GUARD_RECONCILE_INTERVAL": interval}) as guard:
                bench.load(guard, 8, 600, rooms=300)  # every room is known
                time.sleep(4)
                before, began = guard.cpu(), time.monotonic()
                time.sleep(seconds)
                if interval == "3":
                    share.guard.append((guard.cpu() - before) / (time.monotonic() - began) * 100)
                paced = bench.load(guard, 1, int(50 * seconds), rate=50.0, rooms=50)
                figure.guard.append(percentile(paced.latencies, 0.99) * MS)
    bench.dependencies.ask({"rooms": 50})
    bench.say(f"reconciling: {median(share.guard):.1f} % of a core")


def policy_change(bench: Bench) -> None:
    """From ``POST /policy-changed`` until the camera of 20 people in the call is revoked."""
    first = bench.figure("policy change to first revocation", "ms", digits=1)
    last = bench.figure("policy change to last of 20 revocations", "ms", digits=1)
    people = 20
    with GuardProcess(bench.dependencies, {"GUARD_RECONCILE_INTERVAL": "3600"}) as guard:
        for number in range(max(2, bench.rounds)):
            bench.dependencies.ask({"rooms": number + 1, "participants": people, "forbid": ["allow_screenshare"]})
            bench.load(guard, 1, 5, first=number, rooms=1)
            bench.dependencies.ask({"reset": True, "forbid": ["allow_camera", "allow_screenshare"]})
            began = time.monotonic()
            status = guard.operator("/policy-changed", json.dumps({"room_id": room_id(number)}).encode())
            if status != 202:
                raise RuntimeError(f"the operators' listener answered {status}")
            while len(updated := bench.dependencies.ask({})["updated_at"]) < people:
                if time.monotonic() > began + 10:
                    raise RuntimeError("nothing was revoked")
                time.sleep(0.01)
            first.guard.append((updated[0] - began) * MS)
            last.guard.append((updated[-1] - began) * MS)
            somebody = [cached_alias(room_id(number)), f"{user_id(number * people)}:PHONE"]
            answer = bench.dependencies.ask({"participant": somebody})["participant"]
            if answer["permission"]["canPublishSources"] != ["MICROPHONE"]:
                raise RuntimeError("the camera was not revoked")
    bench.dependencies.ask({"rooms": 50, "forbid": ["allow_screenshare"]})
    bench.say(f"policy change: last of {people} revocations after {median(last.guard):.0f} ms")


def start_up(bench: Bench) -> None:
    """From starting the process to its first answer, and its memory when idle."""
    compile_guard()
    ready = bench.figure("start-up to first answer", "s", 0.35)
    memory = bench.figure("memory after start-up", "MB", 60.0, digits=0)
    for _ in range(max(2, bench.rounds)):
        with GuardProcess(bench.dependencies) as guard:
            time.sleep(0.3)
            ready.guard.append(guard.ready)
            memory.guard.append(guard.status("VmRSS") / 1024)
    bench.say(f"start-up {median(ready.guard):.2f} s, {median(memory.guard):.0f} MB")
