# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: their arithmetic, the guard that they compare with, and a small round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import jwt
import pytest

from benchmarks.__main__ import with_table
from benchmarks.chart import GROWTH, JOINS, growth_chart, joins_chart
from benchmarks.figures import Figure, markdown, percentile
from benchmarks.joins import sources_of
from benchmarks.load import Load
from benchmarks.prepared_answers import SECRET, Scene, SfuRooms, cached_alias, issued_token, room_id, room_state
from benchmarks.processes import Callers, Dependencies, GuardProcess, PeerProcess, Subject
from benchmarks.profile import library_of, table


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile(range(1, 101), 0.5) == 50
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([3, 1, 2], 1.0) == 3
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_ratios_are_taken_within_a_round_and_their_median_counts() -> None:
    figure = Figure("cost", "ms", guard=[1.0, 10.0, 1.0], peer=[2.0, 20.0, 4.0], aim=0.5)
    assert figure.ratio == 0.5
    assert figure.met is True
    assert Figure("cost", "ms", guard=[3.0], peer=[4.0], aim=0.5).met is False
    assert Figure("share", "%", guard=[20.0, 30.0, 10.0], aim=25.0).met is True
    assert Figure("share", "%", guard=[20.0]).met is None


def test_table_marks_missed_targets() -> None:
    text = markdown([Figure("cost", "ms", guard=[3.0], peer=[4.0], aim=0.5), Figure("only", "s", peer=[2.0])])
    assert "| cost [ms] | 3.00 | 4.00 | 0.75 |  | ≤ 0.5 **missed** |" in text
    assert "| only [s] | – | 2.00 |  |  |  |" in text


def test_the_page_gets_a_new_table_and_keeps_the_rest() -> None:
    page = with_table("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n", "new\n")
    assert page == "before\n<!-- table -->\nnew\n<!-- /table -->\nafter\n"
    with pytest.raises(ValueError, match="no place"):
        with_table("no marks", "new\n")


def bars_of(svg: str) -> list[float]:
    rects = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
    return [float(rect.get("width", "0")) for rect in rects if rect.get("class") == "bar"]


def test_the_charts_draw_all_bars_on_one_scale() -> None:
    figures = [
        Figure(JOINS[0][0], "ms", guard=[1.0], peer=[2.0], relay=[0.5]).as_json(),
        Figure(JOINS[1][0], "ms", guard=[4.0]).as_json(),
    ]
    own, relay, peer, other = bars_of(joins_chart(figures))
    assert (relay, peer, other) == pytest.approx((own / 2, own * 2, own * 4), rel=0.01)
    sizes = [Figure(name, "ms", guard=[1.0]).as_json() for name, _ in GROWTH]
    assert len(set(bars_of(growth_chart(sizes)))) == 1
    assert len(bars_of(growth_chart(sizes))) == len(GROWTH)


def test_ratios_to_the_bare_relay_have_an_aim_of_their_own() -> None:
    figure = Figure("cost", "ms", guard=[3.0], peer=[4.0], relay=[2.0], aim=1.0, relay_aim=1.6)
    assert figure.relay_ratio == 1.5
    assert "≤ 1 met, relay ≤ 1.6 met" in markdown([figure])


def test_profiled_functions_are_grouped_by_library() -> None:
    assert library_of("/x/site-packages/twisted/web/http.py", "f") == "twisted.web"
    assert library_of("/x/site-packages/klein/_app.py", "f") == "klein"
    assert library_of("/src/lotusguard/guard/admission.py", "join") == "lotusguard.guard"
    assert library_of("~", "<method 'poll' of 'select.epoll' objects>") == "waiting"
    stats: dict[Any, Any] = {
        ("/src/lotusguard/rules/a.py", 1, "f"): (1, 10, 0.5, 0.5, {}),
        ("~", 0, "poll"): (1, 1, 9.0, 9.0, {}),
    }
    assert table(stats, joins=10, most=5).startswith("10 joins under cProfile, 50000 us each")


def test_the_stand_ins_issue_true_tokens_and_answer_in_both_formats() -> None:
    token = issued_token(room_id(1), "@a:x", "D").decode()
    claims = jwt.decode(token, SECRET, algorithms=["HS256"])
    assert (claims["sub"], claims["video"]["room"]) == ("@a:x:D", cached_alias(room_id(1)))
    rooms = SfuRooms.of(Scene(rooms=2, participants=3))
    in_json = json.loads(rooms.participants(cached_alias(room_id(1)), as_json=True))
    assert len(in_json["participants"]) == 3
    assert len(json.loads(room_state(Scene(honour_type=False), room_id(1), "io.lotus.voice_limit"))["state"]) == 32
    assert len(json.loads(room_state(Scene(), room_id(1), "io.lotus.voice_limit"))["state"]) == 1


@pytest.fixture(scope="module")
def helpers() -> Iterator[tuple[Dependencies, Callers]]:
    with Dependencies() as dependencies, Callers() as callers:
        yield dependencies, callers


@pytest.mark.parametrize("kind", [GuardProcess, PeerProcess])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_small_round_runs(helpers: tuple[Dependencies, Callers], kind: type[Subject], fresh: bool) -> None:
    dependencies, callers = helpers
    with kind(dependencies) as subject:
        before = subject.cpu()
        outcome = callers.make(Load(subject.port, 4, 100, fresh=fresh))
        assert outcome.statuses == {"200": 100}
        assert len(outcome.latencies) == 100
        assert subject.cpu() > before
        sources = sources_of(outcome.sample)
    assert sources == (["microphone", "camera"] if kind is GuardProcess else [])


def test_users_who_were_never_seen_are_members_of_the_room_that_they_ask_for(
    helpers: tuple[Dependencies, Callers],
) -> None:
    dependencies, callers = helpers
    with GuardProcess(dependencies) as guard:
        assert callers.make(Load(guard.port, 4, 40, rooms=4, strangers=1)).statuses == {"200": 40}


@pytest.mark.parametrize("kind", [GuardProcess, PeerProcess])
def test_guard_and_peer_enforce_the_limit(helpers: tuple[Dependencies, Callers], kind: type[Subject]) -> None:
    dependencies, callers = helpers
    dependencies.ask({"cap": 20})
    try:
        with kind(dependencies) as subject:
            statuses = callers.make(Load(subject.port, 1, 20, rooms=1)).statuses
    finally:
        dependencies.ask({"cap": 50})
    assert statuses == {"200": 10, "403": 10}, "ten of them are in the call, which is full"
