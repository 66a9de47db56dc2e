# SPDX-License-Identifier: Apache-2.0
"""What guards do when Redis loses data, scripts or time, and what they leave there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from secrets import token_hex

import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults

from lotusguard.guard.seats.book import Issued, OverLimit
from lotusguard.guard.seats.redis.epoch import GUARD_SEEN, HEARTBEAT, SEEN
from lotusguard.guard.seats.redis.generation import RECORD
from lotusguard.guard.seats.redis.leases import LEASE
from lotusguard.guard.seats.redis.scripts import room_keys, with_rules
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.seats import Arrival
from tests.conftest import until

from .conftest import OwnServer
from .direct import Crash, DirectGuard, Server
from .guards import guards, reactor
from .test_crashes import outcome_of
from .test_seat_book import ALIAS, issue, listed

SET_BACK = with_rules("""
Store.open()
room.at = room.at + tonumber(ARGV[1])
Seats.shift(tonumber(ARGV[1]))
Seats.close(600)
""")
"""What a room looks like after the server's clock was set back by so many seconds."""


@pytest_twisted.ensureDeferred
async def test_every_guard_gives_back_its_holds_after_everything_was_deleted(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 2) as (first, second):
        await listed(first, room, 3)
        await issue(first, room, "a", 3)
        await issue(second, room, "b", 3)
        before = {first.rebuilding.data_set, second.rebuilding.data_set}
        own_server.client.flushall()
        await until(lambda: before.isdisjoint({first.rebuilding.data_set, second.rebuilding.data_set}))
        await gatherResults([Deferred.fromCoroutine(guard.rebuilding.wait()) for guard in (first, second)])
        for guard in (first, second):
            assert await guard.book.owns_seat(room, "a")
            assert await guard.book.owns_seat(room, "b")


@pytest_twisted.ensureDeferred
async def test_nobody_new_is_seated_right_after_everything_was_deleted(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 2) as (first, second):
        await listed(first, room, 1)
        await issue(first, room, "a", 1)
        own_server.client.flushall()
        assert await second.book.take(room, "new", 1, ALIAS) is Refusal.FULL
        assert await second.book.owns_seat(room, "a")


@pytest_twisted.ensureDeferred
async def test_a_call_is_started_still_after_everything_was_deleted(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 2) as (first, second):
        joined = reactor.seconds()
        await first.book.start(room)
        await issue(first, room, "a", None)
        own_server.client.flushall()
        await until(lambda: not first.rebuilding.complete)
        await first.rebuilding.wait()
        assert await second.book.is_started(room), "a token that was issued says so"
        other = f"{room}2"
        await second.book.apply_listing(other, ALIAS, [Arrival("PA_x", "x", "x", joined)], None, reactor.seconds())
        assert await second.book.is_started(other), "somebody has been in the call for longer than the data"


@pytest_twisted.ensureDeferred
async def test_scripts_that_the_server_forgot_are_sent_again(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 1) as (guard,):
        await listed(guard, room, 1)
        own_server.client.script_flush()
        hold_id = await guard.book.take(room, "a", 1, ALIAS)
        assert isinstance(hold_id, str)
        own_server.client.script_flush()
        await guard.book.issue(room, hold_id, Issued(ALIAS, "a"), durable=True)
        assert await guard.book.take(room, "b", 1, ALIAS) is Refusal.FULL
        assert not guard.book.unshared


@pytest_twisted.ensureDeferred
async def test_a_clock_that_is_set_back_neither_keeps_seats_nor_rejects_listings(
    own_server: OwnServer, room: str
) -> None:
    async with guards(own_server.url, 1, 1.0) as (guard,):
        await listed(guard, room, 1)
        await issue(guard, room, "a", 1)
        await guard.client.run(SET_BACK, room_keys(room), "3600")
        assert await guard.book.take(room, "b", 1, ALIAS) is Refusal.FULL
        end = reactor.seconds() + 1.5
        await until(lambda: reactor.seconds() > end)
        await listed(guard, room, 1)
        assert isinstance(await guard.book.take(room, "b", 1, ALIAS), str)


def test_a_listing_from_a_guard_whose_clock_is_ahead_counts_from_now_on_at_most() -> None:
    server = Server()
    server.replace({})
    guard = DirectGuard(server)
    server.now += 6.0
    guard.clock.advance(6.0)
    outcome_of(guard.upkeep())
    outcome_of(guard.book.apply_listing("!r", ALIAS, [], 1, guard.clock.seconds() + 3600.0))
    outcome_of(guard.book.is_started("!r"))
    _, since = outcome_of(guard.book.listed_since("!r", [ALIAS]))
    assert since <= guard.clock.seconds()


def test_a_join_that_is_made_again_waits_until_the_new_data_set_is_complete() -> None:
    server, guards = _two_guards()
    first, second = guards
    _issue_only_seat(first, "!again")
    _pass(server, guards, 1.0)

    def restart(key: str, request: str) -> None:
        server.spy = lambda key, request: None
        _restart_empty(server, guards)

    server.spy, second.client.crash = restart, Crash.AFTER  # the answer is lost, and then the server and its data
    taken: list[object] = []
    Deferred.fromCoroutine(second.book.take("!again", "new", 1, ALIAS)).addBoth(taken.append)
    assert not taken, "the other guard has not given back its holds"
    _pass(server, guards, 2.0)
    assert taken == [Refusal.FULL]
    assert not second.book.unshared


def test_nobody_is_seated_by_a_listing_while_another_guard_has_holds_to_give_back() -> None:
    server, guards = _two_guards()
    first, second = guards
    _issue_only_seat(second, "!full")
    _restart_empty(server, guards)
    _pass(server, [first], 1.0)
    _enforce(first, 1, "x")
    _pass(server, guards, 2.0)
    over = _enforce(first, 1, "x")
    assert outcome_of(second.book.owns_seat("!full", "a")) == (True, True)
    assert [hold.identity for hold in over] == ["x"]


def test_somebody_in_the_call_gets_back_the_seat_that_another_guard_gave_them() -> None:
    server, guards = _two_guards()
    first, second = guards
    _issue_only_seat(second, "!full")
    _restart_empty(server, guards)
    _pass(server, [first], 1.0)
    assert not _enforce(first, 1, "x", "a")
    _pass(server, guards, 2.0)
    assert [hold.identity for hold in _enforce(first, 1, "x", "a")] == ["x"]


def test_a_guard_is_told_when_it_is_known_again_who_holds_the_seats() -> None:
    server, guards = _two_guards()
    first, _ = guards
    told: list[str] = []
    first.rebuilding.on_complete.append(lambda: told.append("complete"))
    first.book.on_shared.append(lambda: told.append("shared"))
    server.up = False
    outcome_of(first.book.owns_seat("!told", "a"))
    assert first.book.unshared
    server.up = True
    _pass(server, guards, 1.0)
    assert told == ["shared"]
    _restart_empty(server, guards)
    _pass(server, [first], 1.0)
    assert told == ["shared"], "the other guard has not given back its holds"
    _pass(server, guards, 2.0)
    assert told == ["shared", "complete"]


def _enforce(guard: DirectGuard, limit: int, *users: str) -> Sequence[OverLimit]:
    """List a room in which these users are, the first for longest, and see who has to go."""
    now = guard.clock.seconds()
    present = [Arrival(f"PA_{user}", user, user, now + place / 1000) for place, user in enumerate(users)]
    outcome_of(guard.book.apply_listing("!full", ALIAS, present, limit, now))
    over: Sequence[OverLimit] = outcome_of(guard.book.overflow("!full", limit))[1]
    return over


def test_guards_agree_on_a_name_after_the_first_replica_of_a_running_server_changed_it() -> None:
    server = Server()
    server.replace({})
    first = DirectGuard(server)
    _pass(server, [first], 6.0)
    server.epoch = "renamed"  # connected guards are not told
    guards = [first, DirectGuard(server)]
    _pass(server, guards, 3.0)
    agreed = {guard.rebuilding.data_set for guard in guards}
    assert len(agreed) == 1
    assert all(guard.rebuilding.complete for guard in guards)
    _pass(server, guards, 3.0)
    assert {guard.rebuilding.data_set for guard in guards} == agreed


def test_a_guard_that_notices_a_loss_later_than_others_keeps_no_room_from_them() -> None:
    server, guards = _two_guards()
    early, late = guards
    server.replace({}, same_server=True)
    outcome_of(early.upkeep())
    for guard, user in ((early, "a"), (late, "b")):
        outcome_of(guard.book.arrive("!late", ALIAS, Arrival(f"PA_{user}", user, user, None), 5))
    _pass(server, guards, 6.0)
    for guard in guards:
        assert set(outcome_of(guard.shared.occupants("!late"))[1]) == {"a", "b"}


def _two_guards() -> tuple[Server, tuple[DirectGuard, DirectGuard]]:
    """A server without data, and guards that have been using it for some seconds."""
    server = Server()
    server.replace({})
    guards = DirectGuard(server), DirectGuard(server)
    _pass(server, guards, 6.0)
    return server, guards


def _issue_only_seat(guard: DirectGuard, room: str) -> None:
    """Give user a the one seat of a room."""
    outcome_of(guard.book.apply_listing(room, ALIAS, [], 1, guard.clock.seconds()))
    _, hold_id = outcome_of(guard.book.take(room, "a", 1, ALIAS))
    outcome_of(guard.book.issue(room, hold_id, Issued(ALIAS, "a"), durable=True))


def _restart_empty(server: Server, guards: Sequence[DirectGuard]) -> None:
    """The server restarts without its data."""
    server.replace({})
    for guard in guards:
        guard.client.connected = False


def _pass(server: Server, guards: Sequence[DirectGuard], seconds: float) -> None:
    for _ in range(int(seconds * 2)):
        server.now += 0.5
        for guard in guards:
            guard.clock.advance(0.5)
            outcome_of(guard.upkeep())


@pytest_twisted.ensureDeferred
async def test_every_key_has_an_end_and_the_keys_of_a_script_have_one_tag(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 2) as (first, second):
        await listed(first, room, 2)
        await issue(first, room, "a", 2)
        await second.book.arrive(room, ALIAS, Arrival("PA_a", "a", "a"), 2)
        await first.client.run(LEASE, (f"lotusguard:lease:{{{room}}}", f"lotusguard:fence:{{{room}}}"), "g", "8000")
        await first.client.probe()
        keys = [key.decode() for key in own_server.client.keys("*")]
        assert len(keys) >= 5
        assert not [key for key in keys if own_server.client.ttl(key) < 0]
        assert all(key.startswith("lotusguard:") for key in keys)
    assert {re.findall(r"\{.*?\}", key)[0] for key in (SEEN, RECORD)} == {"{guards}"}
    assert {key.count(f"{{{room}}}") for key in room_keys(room)} == {1}


@pytest_twisted.ensureDeferred
async def test_guards_that_come_and_go_leave_nothing(own_server: OwnServer) -> None:
    async with guards(own_server.url, 1) as (guard,):
        epoch = own_server.client.hget(RECORD, "epoch").decode()
        for _ in range(200):
            request = (
                f'{{"epoch": "{epoch}", "generation": "", "proposed": "x", "guard": "{token_hex(6)}", "seen": ["y"],'
                ' "given_back": true, "fresh": false, "longest": 0}'
            )
            await guard.client.run(HEARTBEAT, (SEEN, RECORD), request)
        assert own_server.client.hlen(RECORD) <= 5
        own_server.client.zadd(SEEN, {f"old{n}": own_server.client.time()[0] - 2 * GUARD_SEEN for n in range(100)})
        await guard.rebuilding.heartbeat()
        assert own_server.client.zcount(SEEN, "-inf", own_server.client.time()[0] - GUARD_SEEN) == 0


@pytest_twisted.ensureDeferred
async def test_a_server_that_accepts_no_writes_is_named_and_not_tried_by_every_join(
    own_server: OwnServer, room: str
) -> None:
    async with guards(own_server.url, 1) as (guard,):
        await listed(guard, room, 1)
        client = own_server.client
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
        await issue(guard, room, "a", 1)
        assert guard.book.unshared
        assert guard.client.trouble == "out_of_memory"
        end = reactor.seconds() + 2.0
        await until(lambda: reactor.seconds() > end)
        assert guard.book.unshared, "a server that only reads shares nothing"
        client.config_set("maxmemory", "0")
        await until(lambda: not guard.book.unshared, 30)
        await listed(guard, room, 1)
        assert await guard.book.owns_seat(room, "a")
