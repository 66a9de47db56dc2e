# SPDX-License-Identifier: Apache-2.0
"""Policies: how long one is believed, what serves when the homeserver does not answer, and what is forgotten first."""

from __future__ import annotations

import tracemalloc
from collections.abc import Collection, Mapping
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.rooms.policies import Freshness, KnownPolicy, Policies
from lotusguard.guard.rooms.remembered import MALFORMED_LOGGED, RememberedPolicies
from lotusguard.metrics import Metrics
from lotusguard.rules.membership import Membership
from lotusguard.rules.policy import NO_POLICY, LimitOrigin, Policy
from lotusguard.rules.state import CALL_PERMISSIONS, CREATE, VOICE_LIMIT, StateEvent
from tests.calls import logged, named

State = Mapping[str, StateEvent] | None


def limit_of(limit: int) -> Policy:
    return Policy(limit, limit_origin=LimitOrigin.ROOM)


def fresh(limit: int) -> KnownPolicy:
    return KnownPolicy(limit_of(limit), Freshness.FRESH, room_exists=True)


def outcome(waiting: Deferred[Any]) -> Any:
    """The result or the exception of a Deferred; None while there is neither."""
    waiting.addErrback(lambda failure: failure.value)
    return waiting.result if waiting.called else None


class Rooms:
    """A homeserver that answers when the test says so. It is a `RoomStateSource`."""

    def __init__(self) -> None:
        self.asked: list[Deferred[State]] = []

    async def room_state(self, room_id: str, types: Collection[str]) -> State:
        waiting: Deferred[State] = Deferred()
        self.asked.append(waiting)
        return await waiting

    async def membership(self, user_id: str, room_id: str) -> Membership:
        raise NotImplementedError

    async def members(self, room_id: str) -> frozenset[str] | None:
        return None

    def answer(self, limit: int | None, at: int = -1) -> None:
        events = {CREATE: StateEvent(CREATE, {"room_version": "10"}, "@alice:x")}
        if limit is not None:
            events[VOICE_LIMIT] = StateEvent(VOICE_LIMIT, {"max_users": limit}, "@alice:x")
        self.asked[at].callback(events)

    def fail(self) -> None:
        self.asked[-1].errback(DependencyFailed("synapse", "timeout"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rooms() -> Rooms:
    return Rooms()


@pytest.fixture
def policies(clock: Clock, rooms: Rooms) -> Policies:
    return Policies(rooms, RememberedPolicies(Metrics()), clock, Metrics(), ttl=10, stale=3600)


def get(policies: Policies, clock: Clock, room_id: str = "!r", since: float | None = None) -> Deferred[KnownPolicy]:
    return Deferred.fromCoroutine(policies.get(room_id, Deadline.after(clock, 1.5), since))


def test_a_policy_is_fresh_for_its_ttl(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    first = get(policies, clock)
    rooms.answer(5)
    assert outcome(first) == fresh(5)
    clock.advance(9.9)
    assert outcome(get(policies, clock)) == fresh(5)
    assert len(rooms.asked) == 1
    clock.advance(0.2)
    get(policies, clock)
    assert len(rooms.asked) == 2


def test_the_age_of_a_policy_counts_from_the_request(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    get(policies, clock)
    clock.advance(1.4)
    rooms.answer(5)
    clock.advance(8.7)
    get(policies, clock)
    assert len(rooms.asked) == 2


def test_a_decision_can_require_a_lookup_that_began_after_its_request(
    policies: Policies, rooms: Rooms, clock: Clock
) -> None:
    get(policies, clock)
    clock.advance(1)
    arrived = clock.seconds()
    newer = get(policies, clock, since=arrived)
    rooms.answer(1)
    assert outcome(newer) is None
    rooms.answer(2)
    assert outcome(newer) == fresh(2)
    assert outcome(get(policies, clock, since=arrived)) == fresh(2)
    assert len(rooms.asked) == 2


def test_the_last_known_policy_is_used_for_a_limited_time(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    get(policies, clock)
    rooms.answer(5)
    clock.advance(11)
    stale = get(policies, clock)
    rooms.fail()
    assert outcome(stale) == KnownPolicy(limit_of(5), Freshness.STALE, None, "timeout")
    clock.advance(3600)
    unknown = get(policies, clock)
    rooms.fail()
    assert outcome(unknown) == KnownPolicy(NO_POLICY, Freshness.UNKNOWN, None, "timeout")


def test_a_failure_is_remembered_for_a_second(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    get(policies, clock)
    rooms.fail()
    assert outcome(get(policies, clock)) == KnownPolicy(NO_POLICY, Freshness.UNKNOWN, None, "timeout")
    assert len(rooms.asked) == 1
    clock.advance(1.1)
    get(policies, clock)
    assert len(rooms.asked) == 2


def test_a_state_without_events_is_unknown(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    """The last local user has left: the homeserver answers with an empty state, which says nothing about the policy."""
    get(policies, clock)
    rooms.answer(5)
    clock.advance(11)
    emptied = get(policies, clock)
    rooms.asked[-1].callback({})
    assert outcome(emptied) == KnownPolicy(limit_of(5), Freshness.STALE, None, "no_state")


def test_an_unknown_room_has_no_policy(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    asked = get(policies, clock)
    rooms.asked[-1].callback(None)
    assert outcome(asked) == KnownPolicy(NO_POLICY, Freshness.FRESH, room_exists=False)


def test_a_lookup_that_nobody_awaits_is_cancelled(policies: Policies, rooms: Rooms, clock: Clock) -> None:
    waiting = get(policies, clock)
    clock.advance(1.6)
    assert outcome(waiting) == KnownPolicy(NO_POLICY, Freshness.UNKNOWN, None, "timeout")
    assert rooms.asked[0].called
    again = get(policies, clock)
    rooms.answer(5)
    assert outcome(again) == fresh(5)


def test_an_answer_to_a_request_from_before_a_change_is_not_used(
    policies: Policies, rooms: Rooms, clock: Clock
) -> None:
    get(policies, clock)
    clock.advance(0.1)
    policies.forget_freshness("!r")
    new = get(policies, clock)
    rooms.answer(9, at=0)
    assert outcome(new) is None
    rooms.answer(2)
    assert outcome(new) == fresh(2)
    assert outcome(get(policies, clock)) == fresh(2)


def test_a_changed_policy_is_still_the_last_known_one_while_the_homeserver_is_down(rooms: Rooms, clock: Clock) -> None:
    policies = Policies(rooms, RememberedPolicies(Metrics()), clock, Metrics(), ttl=3600, stale=3600)
    get(policies, clock)
    rooms.answer(5)
    clock.advance(1)
    policies.forget_freshness("!r")
    stale = get(policies, clock)
    rooms.fail()
    assert outcome(stale) == KnownPolicy(limit_of(5), Freshness.STALE, None, "timeout")


@pytest.mark.parametrize("room_id", ["!" + "a" * 300, "!room\x00:x", "!room\n:x"])
def test_a_name_that_no_room_can_have_is_not_looked_up(
    policies: Policies, rooms: Rooms, clock: Clock, room_id: str
) -> None:
    assert outcome(get(policies, clock, room_id)) == KnownPolicy(NO_POLICY, Freshness.FRESH, room_exists=False)
    assert not rooms.asked


@pytest.mark.parametrize("default", [None, 10])
def test_made_up_rooms_make_no_known_policy_forgotten(
    rooms: Rooms, clock: Clock, default: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.rooms.remembered.POLICIES_KEPT", 64 * 1024)
    monkeypatch.setattr("lotusguard.guard.rooms.remembered.ROOMS_WITHOUT_POLICY_KEPT", 8 * 1024)
    policies = Policies(rooms, RememberedPolicies(Metrics(), default), clock, Metrics(), ttl=10, stale=3600)
    get(policies, clock)
    rooms.answer(5)
    for number in range(100):
        get(policies, clock, f"!made-up-{number}")
        rooms.asked[-1].callback(None)
    assert policies.last_known("!r") == limit_of(5)
    assert not policies.is_remembered("!made-up-0")


def exceptions(number: int, value: object) -> dict[str, StateEvent]:
    """The state of a room with so many exceptions for users."""
    content = {"users": {f"@{user}:x": value for user in range(number)}}
    return {kind: StateEvent(kind, content, "@alice:x") for kind in (CALL_PERMISSIONS, CREATE)}


@pytest.mark.parametrize("value", [{"join": True}, 1])
def test_long_policies_cost_as_much_as_they_take_in_memory(
    rooms: Rooms, clock: Clock, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.rooms.remembered.POLICIES_KEPT", 4 << 20)
    policies = Policies(rooms, RememberedPolicies(Metrics(), 5), clock, Metrics(), ttl=10, stale=3600)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(30):
        get(policies, clock, f"!{number}")
        rooms.asked[-1].callback(exceptions(1000, value))
        rooms.asked.clear()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken < 2 * (4 << 20)


def test_few_of_the_keys_that_cannot_be_used_are_logged_and_all_are_counted(
    policies: Policies, rooms: Rooms, clock: Clock
) -> None:
    with logged() as events:
        get(policies, clock)
        rooms.asked[-1].callback(exceptions(1000, 1))
    lines = named(events, "malformed_policy")
    assert len(lines) == MALFORMED_LOGGED
    assert "1000 keys in all" in lines[0]


def test_the_default_limit_is_for_rooms_that_set_none(rooms: Rooms, clock: Clock) -> None:
    policies = Policies(rooms, RememberedPolicies(Metrics(), 10), clock, Metrics(), ttl=10, stale=3600)
    for room_id, own, limit in (("!a", None, 10), ("!b", 3, 3), ("!c", 20, 20), ("!d", 0, None)):
        asked = get(policies, clock, room_id)
        rooms.answer(own)
        assert outcome(asked).policy.max_users == limit
