# SPDX-License-Identifier: Apache-2.0
"""Who may stay in a call, on a clock: the reasons for removals, and how often memberships are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest
from livekit.protocol.models import ParticipantInfo
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.calls.entitlement import Entitlement
from lotusguard.guard.calls.memberships import (
    ABSENCE_FORGOTTEN,
    ABSENT_FOR,
    FOREIGN_ABSENT_FOR,
    LIST_FROM,
    LOOKUPS_AT_ONCE,
    PUSHED_FACTOR,
    PUSHES_LAPSE,
    CallMemberships,
)
from lotusguard.guard.rooms.members import Members
from lotusguard.guard.rooms.policies import Freshness, KnownPolicy
from lotusguard.guard.seats.registry import MemoryTokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.homeservers import HomeserverList
from lotusguard.rules.members_only import MembersOnly
from lotusguard.rules.membership import Membership
from lotusguard.rules.policy import NO_POLICY
from lotusguard.rules.state import StateEvent
from tests.calls import logged, named
from tests.lobby.voice import lobby_on

ROOM, ALIAS = "!room:local", "alias"
ALICE, BOB, FOREIGNER = "@alice:local", "@bob:local", "@eve:elsewhere"
TTL, INTERVAL, TIMEOUT = 10.0, 30.0, 1.5
KNOWN = KnownPolicy(NO_POLICY, Freshness.FRESH, room_exists=True)
STALE = KnownPolicy(NO_POLICY, Freshness.STALE, room_exists=None)
UNKNOWN = KnownPolicy(NO_POLICY, Freshness.UNKNOWN, room_exists=None)
Kind = ParticipantInfo.Kind


class Homeserver:
    """A homeserver that answers at once, fails, or never answers.

    :ivar asked: number of requests for single memberships and for lists.
    """

    def __init__(self) -> None:
        self.memberships: dict[str, Membership] = {}
        self.asked: Counter[str] = Counter()
        self.fails = self.hangs = False
        self.list_fails = False

    async def room_state(self, room_id: str, types: Collection[str]) -> Mapping[str, StateEvent] | None:
        raise NotImplementedError

    async def membership(self, user_id: str, room_id: str) -> Membership:
        await self._answer("membership")
        return self.memberships.get(user_id, Membership.ABSENT)

    async def members(self, room_id: str) -> Collection[str] | None:
        await self._answer("members")
        if self.list_fails:
            raise DependencyFailed("synapse", "too_large")
        return {user for user, membership in self.memberships.items() if membership is Membership.JOIN}

    async def _answer(self, what: str) -> None:
        self.asked[what] += 1
        if self.hangs:
            await Deferred()
        if self.fails:
            raise DependencyFailed("synapse", "status_500")


class NoLobby:
    """The lobby is switched off."""

    async def is_on(self, room_id: str, known: KnownPolicy) -> bool:
        return False


class Call:
    """A call, and the part of the guard that is tested."""

    def __init__(self, members_only: MembersOnly = MembersOnly.ON, homeservers: str = "*", name: str = "local") -> None:
        self.clock, self.metrics, self.homeserver = Clock(), Metrics(), Homeserver()
        self.clock.advance(1000)
        self.members = Members(self.homeserver, self.clock, self.metrics, TTL)
        registry = MemoryTokenRegistry(None, self.clock, self.metrics)
        lobby = self.lobby = lobby_on(self.clock, self.metrics)
        switch: Any = NoLobby()
        memberships = CallMemberships(
            self.members, members_only, lambda: name, self.clock, self.metrics, TIMEOUT, INTERVAL
        )
        self.entitlement = Entitlement(
            memberships, registry, lobby, switch, HomeserverList.parse(homeservers), self.clock, self.metrics
        )

    def join(self, *users: str) -> None:
        self.homeserver.memberships.update(dict.fromkeys(users, Membership.JOIN))

    def set(self, user: str, membership: Membership) -> None:
        self.homeserver.memberships[user] = membership

    def checking(self, *participants: ParticipantInfo, known: KnownPolicy = KNOWN) -> Deferred[Any]:
        return Deferred.fromCoroutine(self.entitlement.unentitled(ROOM, ALIAS, known, participants, whole=True))

    def removed(self, *participants: ParticipantInfo, known: KnownPolicy = KNOWN) -> list[str]:
        """Check the participants. :return: the users to be removed."""
        checking = self.checking(*participants, known=known)
        self.clock.advance(0.2)  # the spacing of lookups
        assert checking.called
        found: Any = checking.result
        return [one.user for one in found.unentitled]

    def value(self, metric: str) -> float:
        return self.metrics.registry.get_sample_value(f"lotusguard_{metric}") or 0.0


def session(user: str, sid: str = "", kind: int = Kind.STANDARD) -> ParticipantInfo:
    return ParticipantInfo(sid=sid or f"PA_{user}", identity=f"{user}:PHONE", kind=kind)  # type: ignore[arg-type]


def sessions(users: Iterable[str]) -> list[ParticipantInfo]:
    return [session(user) for user in users]


# -- reasons for a removal -----------------------------------------------------------------------------


@pytest.mark.parametrize("membership", [Membership.LEAVE, Membership.BAN, Membership.INVITE, Membership.KNOCK])
def test_an_entry_other_than_join_removes_at_once(membership: Membership) -> None:
    call = Call()
    call.join(ALICE)
    call.set(BOB, membership)
    assert call.removed(session(ALICE), session(BOB)) == [BOB]


@pytest.mark.parametrize(("user", "enough"), [(BOB, ABSENT_FOR), (FOREIGNER, FOREIGN_ABSENT_FOR)])
def test_a_missing_entry_removes_after_two_answers_that_are_far_enough_apart(user: str, enough: float) -> None:
    call = Call()
    assert call.removed(session(user)) == []
    call.clock.advance(enough - 0.5)
    assert call.removed(session(user)) == []
    call.clock.advance(0.5)
    assert call.removed(session(user)) == [user]


def test_while_our_homeserver_s_name_is_unknown_every_user_may_be_of_another_one() -> None:
    call = Call(name="")
    assert call.removed(session(BOB)) == []
    call.clock.advance(FOREIGN_ABSENT_FOR - 1)
    assert call.removed(session(BOB)) == []


def test_an_entry_that_appears_in_between_begins_the_wait_anew() -> None:
    call = Call()
    assert call.removed(session(BOB)) == []
    call.join(BOB)
    call.clock.advance(ABSENT_FOR)
    assert call.removed(session(BOB)) == []
    del call.homeserver.memberships[BOB]
    call.members.forget_freshness(ROOM)
    assert call.removed(session(BOB)) == []
    call.clock.advance(ABSENT_FOR)
    assert call.removed(session(BOB)) == [BOB]


def test_an_absence_of_long_ago_does_not_count() -> None:
    call = Call()
    assert call.removed(session(BOB, "PA_1")) == []
    call.clock.advance(ABSENCE_FORGOTTEN + 1)
    assert call.removed(session(BOB, "PA_2")) == []


def test_reconnecting_does_not_begin_the_wait_anew() -> None:
    call = Call()
    assert call.removed(session(BOB, "PA_1")) == []
    call.clock.advance(ABSENT_FOR)
    assert call.removed(session(BOB, "PA_2")) == [BOB]


@pytest.mark.parametrize("known", [STALE, UNKNOWN])
def test_a_missing_entry_never_counts_while_the_room_s_state_is_unknown(known: KnownPolicy) -> None:
    call = Call()
    for _ in range(5):
        assert call.removed(session(BOB), known=known) == []
        call.clock.advance(ABSENT_FOR)


@pytest.mark.parametrize("known", [STALE, UNKNOWN])
def test_a_ban_counts_while_the_room_s_policy_is_unknown(known: KnownPolicy) -> None:
    call = Call()
    call.set(BOB, Membership.BAN)
    assert call.removed(session(BOB), known=known) == [BOB]


def test_unknown_membership_removes_nobody_and_is_counted() -> None:
    call = Call()
    call.set(BOB, Membership.BAN)
    call.homeserver.fails = True
    assert call.removed(session(BOB)) == []
    assert call.value("memberships_unknown_total") == 1
    call.homeserver.fails = False
    assert call.removed(session(BOB)) == [BOB]


def test_a_lookup_that_began_before_a_push_is_not_used() -> None:
    call = Call()
    call.join(BOB)
    assert call.removed(session(BOB)) == []
    call.set(BOB, Membership.BAN)
    assert call.removed(session(BOB)) == []  # trusted for a while
    call.members.forget_freshness(ROOM, BOB)
    assert call.removed(session(BOB)) == [BOB]


def test_a_remembered_leave_is_looked_up_again_before_a_removal() -> None:
    call = Call()
    call.set(BOB, Membership.LEAVE)
    assert call.removed(session(BOB, "PA_1")) == [BOB]
    call.join(BOB)
    assert call.removed(session(BOB, "PA_2")) == []


@pytest.mark.parametrize("kind", [Kind.INGRESS, Kind.EGRESS, Kind.SIP, Kind.AGENT])
def test_participants_that_are_not_people_are_never_removed_and_are_counted(kind: int) -> None:
    call = Call()
    call.set(BOB, Membership.BAN)
    assert call.removed(session(BOB, kind=kind)) == []
    assert call.value("unidentified_participants") == 1
    assert not call.homeserver.asked


def test_identities_without_a_known_user_are_never_removed_and_are_counted() -> None:
    call = Call()
    hashed = ParticipantInfo(sid="PA_1", identity="YrxuWaR+gvn98aOWeDBbgKTPaUDOGxY5XI3xcFmNN/A")
    assert call.removed(hashed, ParticipantInfo(sid="PA_2", identity="recorder")) == []
    assert call.value("unidentified_participants") == 2
    call.entitlement.forget(ALIAS)
    assert call.value("unidentified_participants") == 0


def test_users_of_homeservers_that_are_not_allowed_are_removed_without_a_lookup() -> None:
    call = Call(homeservers="local")
    call.join(ALICE, FOREIGNER)
    assert call.removed(session(FOREIGNER)) == [FOREIGNER]
    assert not call.homeserver.asked


def test_members_only_log_removes_nobody_and_logs_each_session_once() -> None:
    call = Call(MembersOnly.LOG)
    call.set(BOB, Membership.BAN)
    with logged() as events:
        for _ in range(3):
            assert call.removed(session(BOB)) == []
    assert len(named(events, "not_a_member")) == 1
    assert not call.entitlement.memberships.removes_non_members


def test_members_only_off_asks_nothing() -> None:
    call = Call(MembersOnly.OFF)
    call.set(BOB, Membership.BAN)
    assert call.removed(session(BOB)) == []
    assert not call.homeserver.asked
    assert not call.entitlement.checks(ROOM)


# -- how often memberships are read ------------------------------------------------------------------------


def reads_at(call: Call, *times: float) -> list[float]:
    """Check Bob's session at these times. :return: those at which his membership was read."""
    began, read = call.clock.seconds(), []
    for at in times:
        call.clock.advance(began + at - call.clock.seconds())
        before = call.homeserver.asked["membership"]
        assert call.removed(session(BOB)) == []
        if call.homeserver.asked["membership"] > before:
            read.append(at)
    return read


def test_a_membership_is_read_once_in_an_interval() -> None:
    call = Call()
    call.join(BOB)
    assert reads_at(call, 0, 3, 12, 29, 31, 33, 62) == [0, 31, 62]


def test_where_memberships_are_pushed_they_are_read_less_often_until_pushes_cease() -> None:
    call = Call()
    call.join(BOB)
    call.entitlement.memberships.pushed()
    long = INTERVAL * PUSHED_FACTOR
    assert reads_at(call, 0, 31, long - 1, long + 1, PUSHES_LAPSE + 1) == [0, long + 1, PUSHES_LAPSE + 1]


def test_an_arrival_is_checked_by_an_answer_no_older_than_the_ttl() -> None:
    call = Call()
    call.join(BOB)
    assert call.removed(session(BOB, "PA_1")) == []
    call.clock.advance(TTL + 1)
    call.set(BOB, Membership.LEAVE)
    assert call.removed(session(BOB, "PA_2")) == [BOB]


def test_an_arrival_whose_lookup_failed_still_counts_as_an_arrival() -> None:
    call = Call()
    call.join(BOB)
    assert call.removed(session(BOB, "PA_1")) == []
    call.clock.advance(TTL + 1)
    call.homeserver.fails = True
    assert call.removed(session(BOB, "PA_2")) == []
    call.homeserver.fails = False
    call.set(BOB, Membership.LEAVE)
    assert call.removed(session(BOB, "PA_2")) == [BOB]


# -- number of requests --------------------------------------------------------------------------------

MANY = [f"@user{number}:local" for number in range(500)]


def test_a_large_call_is_checked_with_one_request_and_the_missing_are_looked_up_singly() -> None:
    call = Call()
    call.join(*MANY)
    call.set(MANY[7], Membership.BAN)
    call.set(MANY[8], Membership.LEAVE)
    del call.homeserver.memberships[MANY[9]]
    assert sorted(call.removed(*sessions(MANY))) == sorted(MANY[7:9])
    assert call.homeserver.asked == {"members": 1, "membership": 3}


def test_a_small_call_is_checked_without_the_list_of_members() -> None:
    call = Call()
    call.join(*MANY)
    assert call.removed(*sessions(MANY[:LIST_FROM])) == []
    assert call.homeserver.asked == {"membership": LIST_FROM}


def test_several_sessions_of_a_user_share_a_lookup() -> None:
    call = Call()
    call.join(ALICE)
    assert call.removed(*(session(ALICE, f"PA_{number}") for number in range(30))) == []
    assert call.homeserver.asked == {"membership": 1}


def test_within_the_interval_a_large_call_costs_nothing() -> None:
    call = Call()
    call.join(*MANY)
    for _ in range(5):
        assert call.removed(*sessions(MANY)) == []
        call.clock.advance(5)
    assert call.homeserver.asked == {"members": 1}


def test_without_the_list_users_are_looked_up_singly() -> None:
    call = Call()
    call.join(*MANY)
    call.set(MANY[7], Membership.BAN)
    call.homeserver.list_fails = True
    assert call.removed(*sessions(MANY)) == [MANY[7]]
    assert call.homeserver.asked == {"members": 1, "membership": len(MANY)}


def test_a_homeserver_that_hangs_delays_a_check_by_one_timeout() -> None:
    call = Call()
    call.homeserver.hangs = True
    checking = call.checking(*sessions(MANY))
    call.clock.pump([0.1] * int(TIMEOUT * 10 + 2))
    assert checking.called
    found: Any = checking.result
    assert found.unentitled == []
    assert call.homeserver.asked["membership"] <= 10


# -- people who wait in a lobby, where nobody tells of changed memberships ----------------------------------


def wait_in_lobby(call: Call, *users: str) -> list[Deferred[Any]]:
    """Hold requests of these users. They wait ten minutes."""
    held = []
    for user in users:
        assert Deferred.fromCoroutine(call.lobby.ask(ROOM, user)).called
        until = call.clock.seconds() + 600
        held.append(Deferred.fromCoroutine(call.lobby.wait(ROOM, user, until, lambda: True)))
    return held


def rounds(call: Call, seconds: float) -> list[str]:
    """Check every two seconds who waits. :return: who waits then."""
    for _ in range(int(seconds / 2)):
        ending = Deferred.fromCoroutine(call.entitlement.end_waiting_unheard())
        call.clock.pump([0.2] * 10)
        assert ending.called
    return list(call.lobby.waiting_in(ROOM))


@pytest.mark.parametrize("membership", [Membership.BAN, Membership.LEAVE])
def test_people_who_are_no_members_any_more_stop_waiting_in_a_lobby(membership: Membership) -> None:
    call = Call()
    call.join(ALICE, BOB)
    alice, bob = wait_in_lobby(call, ALICE, BOB)
    assert rounds(call, 2) == [ALICE, BOB]
    call.set(BOB, membership)
    assert rounds(call, INTERVAL + 4) == [ALICE]
    assert bob.called
    assert not alice.called


def test_a_leave_that_is_remembered_ends_no_wait_of_somebody_who_is_a_member_again() -> None:
    call = Call()
    call.set(BOB, Membership.LEAVE)
    asked = Deferred.fromCoroutine(call.members.get(ROOM, BOB, Deadline.after(call.clock, TIMEOUT)))
    assert asked.called
    call.clock.advance(1)
    call.join(BOB)
    (bob,) = wait_in_lobby(call, BOB)
    assert rounds(call, 4) == [BOB]
    assert not bob.called


def test_membership_of_somebody_who_waits_is_read_once_in_each_interval() -> None:
    call = Call()
    call.join(BOB)
    wait_in_lobby(call, BOB)
    rounds(call, 4 * INTERVAL)
    assert 3 <= call.homeserver.asked["membership"] <= 5


def test_homeserver_that_does_not_answer_ends_nobodys_waiting_and_is_asked_a_few_things_at_a_time() -> None:
    call = Call()
    users = [f"@{number}:local" for number in range(60)]
    wait_in_lobby(call, *users)
    call.homeserver.hangs = True
    assert len(rounds(call, 2)) == 60
    assert call.homeserver.asked["membership"] <= LOOKUPS_AT_ONCE


def test_nobody_stops_waiting_where_people_need_not_be_members() -> None:
    call = Call(MembersOnly.LOG)
    wait_in_lobby(call, BOB)
    assert rounds(call, 10) == [BOB]
    assert not call.homeserver.asked
