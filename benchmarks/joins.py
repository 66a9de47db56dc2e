# SPDX-License-Identifier: Apache-2.0
"""What a join costs, compared with the same work in other programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.bench import MS, Bench
from benchmarks.figures import Figure, percentile
from benchmarks.prepared_answers import USERS_A_ROOM
from benchmarks.processes import GuardProcess, PeerProcess, RelayProcess, Subject
from lotusguard.rules.jwt import read_unverified

CALLERS = (1, 32, 500)
FIRST, FOLLOWING = "first joins", "following requests"
ROOMS_JOINED = 10
"""Few, so that nearly every request is of the kind that is measured."""


def sources_of(answer: str) -> list[str]:
    """``canPublishSources`` of the token in an answer."""
    claims = read_unverified(json.loads(answer)["jwt"])
    return list(claims["video"].get("canPublishSources", ())) if claims else []


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
                    bench.load(subject, 32, ROOMS_JOINED * USERS_A_ROOM, rooms=ROOMS_JOINED)  # then all are known
                    _measure(bench, rows[FOLLOWING, callers], subject, callers, requests, strangers=0)
                for subject in (guard, peer, relay_of_first):
                    _measure(bench, rows[FIRST, callers], subject, callers, requests, strangers=stranger)
                    stranger += requests
            next_, first = rows[FOLLOWING, 32][0], rows[FIRST, 32][0]
            bench.say(
                f"round {number + 1}, CPU per join: following {next_.guard[-1]:.2f} ms, first {first.guard[-1]:.2f} "
                f"ms; the peer {next_.peer[-1]:.2f} ms; relays {next_.relay[-1]:.2f} and {first.relay[-1]:.2f} ms"
            )
    bench.dependencies.ask({"cap": 50, "rooms": 50})


def _measure(
    bench: Bench, figures: Sequence[Figure], subject: Subject, callers: int, requests: int, *, strangers: int
) -> None:
    """Make a load, and note CPU per join and percentiles. :param strangers: the first user's number; 0: known users."""
    before = subject.cpu()
    outcome = bench.load(subject, callers, requests, rooms=ROOMS_JOINED, strangers=strangers)
    used = (subject.cpu() - before) / requests * MS
    if isinstance(subject, GuardProcess) and "screen_share" in sources_of(outcome.sample):
        raise RuntimeError("the guard did not enforce the sources")
    values = used, percentile(outcome.latencies, 0.5) * MS, percentile(outcome.latencies, 0.99) * MS
    for figure, value in zip(figures, values, strict=True):
        subject.note(figure, value)
