# SPDX-License-Identifier: Apache-2.0
"""Scenarios in which much happens at once, or dependencies fail, or the guard has just started. What joins cost is in
`benchmarks.joins`, and large rooms are in `benchmarks.large`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from threading import Event, Thread

from attrs import define

from benchmarks.bench import MS, Bench
from benchmarks.figures import percentile
from benchmarks.load import Load, Outcome
from benchmarks.prepared_answers import BIG_ROOM, USERS_A_ROOM, cached_alias, room_id, user_id
from benchmarks.processes import GuardProcess, PeerProcess, Subject, compile_guard

CROWD_AIM = 1 / 20
"""Of the peer's time."""


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
    bench.dependencies.ask({"upstream_delay": 1.0, "rooms": rooms})
    for _ in range(bench.long_rounds):
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
                if isinstance(subject, GuardProcess):
                    each.guard.append((subject.status("VmHWM") - idle) / bench.crowd)
                for figure, value in zip((succeeded, p99, memory, threads), values, strict=True):
                    subject.note(figure, value)
                bench.say(f"{name}, {subject.name}: {outcome.statuses}, p99 {values[1]:.1f} s")
    bench.dependencies.ask({"upstream_delay": 0.0, "rooms": 50})


@define
class Watched:
    """Counts the threads of a process while something is done to it. :ivar threads: the most so far."""

    subject: Subject
    threads: int = 0

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
    slowest = 1.6  # GUARD_LOOKUP_TIMEOUT, and what a join takes anyway
    first = bench.figure("dependencies hung: slowest of the first 20 joins", "s", slowest)
    later = bench.figure("dependencies hung: later joins, p50", "ms", digits=1)
    added = bench.figure("dependencies hung: later joins' p50 over normal", "ms", 50.0, digits=1)
    for _ in range(bench.long_rounds):
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
                    subject.note(size, answer["bytes"]["synapse"] / 1000)
                    subject.note(waited, outcome.latencies[0] * MS)
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
    for _ in range(bench.long_rounds):
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
