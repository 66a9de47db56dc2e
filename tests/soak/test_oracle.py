# SPDX-License-Identifier: Apache-2.0
"""The oracle of the soak blames the guard for violations, and for nothing that it could not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lotusguard.rules.identity import room_alias
from lotusguard.rules.permissions import Action, CallPermissions
from lotusguard.rules.policy import Policy
from lotusguard.rules.power_levels import PowerLevels
from lotusguard.rules.sources import CAMERA, MICROPHONE, SCREEN_SHARE
from tests.soak.guard_process import GuardLog
from tests.soak.history import History
from tests.soak.oracle import FULL, GONE_WITHIN, NOT_A_MEMBER, Oracle
from tests.soak.record import Ask, Stay

ROOM, ALICE, BOB = "!room:soak", "@alice:soak", "@bob:soak"
GRANT = {"room": room_alias(ROOM), "roomJoin": True, "canPublish": True, "canPublishSources": ["microphone"]}
NOW = 1000.0
MODERATORS_SPEAK = Policy(permissions=CallPermissions({Action.MICROPHONE: 50}), levels=PowerLevels())


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


def policy_is(oracle: Oracle, policy: Policy, at: float = 0.0) -> None:
    oracle.policies[ROOM].change(policy, at)


def ask(oracle: Oracle, user: str, at: float = NOW) -> Ask:
    return oracle.asked(ROOM, user, f"request of {user}", at)


def issue(oracle: Oracle, user: str, at: float = NOW, exp: float = 10.0, **grant: object) -> Ask:
    asked = ask(oracle, user, at)
    oracle.issued(asked, {"video": {**GRANT, **grant}, "exp": at + exp}, room_alias(ROOM), at + 0.1)
    return asked


def join(oracle: Oracle, user: str, at: float = NOW) -> Stay:
    return oracle.arrived(issue(oracle, user, at), at + 0.2, lambda: True)


def blamed(oracle: Oracle) -> list[str]:
    return [suspicion.what for suspicion in oracle.suspicions]


def test_a_correct_token_is_not_blamed(oracle: Oracle) -> None:
    policy_is(oracle, Policy(max_users=1))
    issue(oracle, ALICE)
    assert blamed(oracle) == []


def test_a_token_past_the_limit_is_blamed(oracle: Oracle) -> None:
    policy_is(oracle, Policy(max_users=1))
    join(oracle, ALICE, NOW - 10)
    issue(oracle, BOB)
    assert blamed(oracle) == ["a token past the limit"]


def test_a_token_for_a_non_member_is_blamed_unless_the_guard_could_not_know_yet(oracle: Oracle) -> None:
    oracle.members[ROOM, ALICE].change(False, NOW - 1)
    issue(oracle, ALICE)
    assert blamed(oracle) == []
    issue(oracle, ALICE, NOW + 10)
    assert blamed(oracle) == ["a token for a non-member"]


def test_a_member_who_is_refused_is_blamed(oracle: Oracle) -> None:
    oracle.refused(ask(oracle, ALICE), NOT_A_MEMBER, NOW + 0.5)
    assert blamed(oracle) == ["a member refused"]


def test_a_refusal_by_an_answer_from_before_the_request_is_blamed(oracle: Oracle) -> None:
    oracle.members[ROOM, ALICE].change(False, NOW - 20)
    oracle.members[ROOM, ALICE].change(True, NOW - 0.01)
    oracle.refused(ask(oracle, ALICE), NOT_A_MEMBER, NOW + 0.5)
    assert blamed(oracle) == ["a member refused"]


def test_a_refusal_beside_a_free_seat_is_blamed(oracle: Oracle) -> None:
    policy_is(oracle, Policy(max_users=2))
    join(oracle, ALICE, NOW - 10)
    oracle.refused(ask(oracle, BOB), FULL, NOW + 0.1)
    assert blamed(oracle) == ["refused beside a free seat"]


def test_a_seat_may_be_held_for_a_request_whose_answer_was_lost(oracle: Oracle) -> None:
    policy_is(oracle, Policy(max_users=1))
    lost = ask(oracle, ALICE)
    lost.ended, lost.lost = NOW + 0.1, True
    oracle.refused(ask(oracle, BOB, NOW + 5), FULL, NOW + 5.1)
    assert blamed(oracle) == []
    oracle.refused(ask(oracle, BOB, NOW + 15), FULL, NOW + 15.1)
    assert blamed(oracle) == ["refused beside a free seat"]


@pytest.mark.parametrize(("answered", "joined", "blame"), [(0.1, 4.0, True), (0.1, 4.5, False), (3.0, 5.5, False)])
def test_the_removal_of_somebody_who_arrived_while_a_seat_was_certainly_held_is_blamed(
    oracle: Oracle, answered: float, joined: float, blame: bool
) -> None:
    policy_is(oracle, Policy(max_users=1))
    asked = ask(oracle, ALICE)
    oracle.issued(asked, {"video": GRANT, "exp": NOW + 10}, room_alias(ROOM), NOW + answered)
    oracle.removed(oracle.arrived(asked, NOW + joined, lambda: True), NOW + joined + 1)
    assert blamed(oracle) == (["removed from their own seat"] if blame else [])


def test_a_guard_that_says_that_its_policy_is_old_is_judged_by_whether_anything_was_wrong(tmp_path: Path) -> None:
    path = tmp_path / "guard.log"
    line = {"time": "2026-01-01T00:00:00+00:00", "level": "info", "event": "join", "unenforced": [], "request_id": "r"}
    path.write_text("".join(json.dumps({**line, "reason": reason}) + "\n" for reason in ("policy", "stale_policy")))
    log = GuardLog.read([path])
    assert dict(log.unenforced) == {"r": ["policy"]}
    assert [found[1:] for found in log.fail_open] == [("policy", "stale")]


def left(oracle: Oracle, user: str, at: float, told: float | None) -> Stay:
    stay = join(oracle, user, at - 10)
    stay.ended, stay.connected = at, lambda: False
    if told is not None:
        oracle.told(stay, told)
    return stay


@pytest.mark.parametrize(
    ("told", "asked", "blame"),
    [
        (NOW, NOW + 5, ["refused beside a free seat"]),
        (NOW + 4, NOW + 5, []),
        (NOW + 4, NOW + 9, ["refused beside a free seat"]),
        (None, NOW + 5, []),
        (None, NOW + 30, ["refused beside a free seat"]),
        (NOW + 40, NOW + 30, ["refused beside a free seat"]),
    ],
)
def test_a_seat_is_kept_for_a_session_that_ended_until_a_guard_is_told_why_or_for_some_time(
    oracle: Oracle, told: float | None, asked: float, blame: list[str]
) -> None:
    policy_is(oracle, Policy(max_users=1))
    left(oracle, ALICE, NOW, told)
    oracle.refused(ask(oracle, BOB, asked), FULL, asked + 0.1)
    assert blamed(oracle) == blame


@pytest.mark.parametrize(
    ("told", "asked", "blame"),
    [
        (NOW, NOW + 8, ["a token past the limit"]),
        (None, NOW + 8, []),
        (None, NOW + 30, ["a token past the limit"]),
    ],
)
def test_somebody_whose_departure_no_guard_was_told_of_may_come_back_past_a_lowered_limit(
    oracle: Oracle, told: float | None, asked: float, blame: list[str]
) -> None:
    policy_is(oracle, Policy(max_users=2))
    join(oracle, BOB, NOW - 10)
    left(oracle, ALICE, NOW, told)
    policy_is(oracle, Policy(max_users=1), NOW + 1)
    issue(oracle, ALICE, asked)
    assert blamed(oracle) == blame


@pytest.mark.parametrize(
    ("ended", "blame"), [(NOW - 20, ["the owner of a seat refused"]), (NOW - 2, []), (NOW + 1, [])]
)
def test_a_refusal_of_a_seats_owner_is_blamed_unless_guards_were_alone(
    oracle: Oracle, ended: float, blame: list[str]
) -> None:
    policy_is(oracle, Policy(max_users=1))
    oracle.disturbances.begin("redis", ended - 1).ended = ended
    issue(oracle, ALICE)
    oracle.refused(ask(oracle, ALICE, NOW + 2), FULL, NOW + 2.1)
    assert [what for what in blamed(oracle) if what == "the owner of a seat refused"] == blame


def test_a_seat_that_was_never_enforced_is_no_reason_for_blame(oracle: Oracle) -> None:
    policy_is(oracle, Policy(max_users=1))
    issued = issue(oracle, ALICE)
    oracle.refused(ask(oracle, ALICE, NOW + 2), FULL, NOW + 2.1)
    suspicion = oracle.suspicions[0]
    assert suspicion.what == "the owner of a seat refused"
    assert suspicion.is_explained({issued.request_id})
    assert not suspicion.is_explained({"another"})


def test_sources_and_life_of_a_token_are_judged(oracle: Oracle) -> None:
    policy_is(oracle, MODERATORS_SPEAK)
    issue(oracle, ALICE, exp=3600.0)
    assert blamed(oracle) == ["a token with a source that is not allowed", "a token that lives too long"]


def test_the_removal_of_a_member_is_blamed_and_that_of_a_banned_user_is_not(oracle: Oracle) -> None:
    oracle.removed(join(oracle, ALICE), NOW + 5)
    assert blamed(oracle) == ["a member removed"]
    stay = join(oracle, BOB)
    oracle.members[ROOM, BOB].change(False, NOW + 4)
    oracle.removed(stay, NOW + 5)
    assert blamed(oracle) == ["a member removed"]


def test_a_non_member_in_the_call_is_timed(oracle: Oracle) -> None:
    join(oracle, ALICE)
    oracle.members[ROOM, ALICE].change(False, NOW + 10)
    oracle.check_stays(ROOM, NOW + 12)
    assert oracle.longest["a non-member in the call"] == 2
    assert not oracle.too_long["a non-member in the call"]
    oracle.check_stays(ROOM, NOW + 11 + GONE_WITHIN)
    assert len(oracle.too_long["a non-member in the call"]) == 1


def test_time_during_a_fault_does_not_count(oracle: Oracle) -> None:
    join(oracle, ALICE)
    oracle.members[ROOM, ALICE].change(False, NOW + 10)
    oracle.disturbances.begin("synapse", NOW + 11)
    oracle.check_stays(ROOM, NOW + 60)
    assert not oracle.too_long["a non-member in the call"]


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        (MODERATORS_SPEAK, "published above their rights"),
        (Policy(forbidden=frozenset({MICROPHONE})), "a forbidden source published"),
        (Policy(forbidden=frozenset({CAMERA, SCREEN_SHARE})), "video labelled as microphone"),
    ],
)
def test_tracks_that_may_not_be_published_are_timed(oracle: Oracle, policy: Policy, what: str) -> None:
    stay = join(oracle, ALICE)
    policy_is(oracle, policy, NOW + 10)
    oracle.check_track(stay, "TR_1", MICROPHONE, True, NOW + 1, NOW + 11 + GONE_WITHIN)
    assert {kind for kind, tracks in oracle.too_long.items() if tracks} == {what}


def test_a_history_knows_since_when_something_is_true() -> None:
    history = History(1)
    history.change(2, 10.0)
    history.change(3, 20.0)
    assert history.true_since(lambda value: value > 1, never=30.0) == 10.0
    assert history.true_since(lambda value: value == 1, never=30.0) == 30.0
    assert history.between(10.0, 15.0) == [2]
    assert history.between(5.0, 25.0) == [1, 2, 3]
