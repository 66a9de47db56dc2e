# SPDX-License-Identifier: Apache-2.0
"""Several guards' seat books over one Valkey: one exact limit, whatever happens to a guard or an answer."""

from __future__ import annotations

from secrets import token_hex

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults

from lotusguard.guard.seats.book import KEPT_FOR, Issued, OverLimit
from lotusguard.guard.seats.redis.scripts import OCCUPIED_ROOM, room_key
from lotusguard.guard.seats.redis.steps import RoomSteps
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.seats import Arrival
from tests.conftest import until

from .guards import LEASE, GuardSeats, guards, reactor

ALIAS = "alias"


async def listed(guard: GuardSeats, room: str, limit: int | None, *present: str) -> None:
    """A listing that begins now and shows these users."""
    who = [Arrival(f"PA_{user}", user, user) for user in present]
    await guard.book.apply_listing(room, ALIAS, who, limit, reactor.seconds())
    await guard.book.is_started(room)  # a listing is applied with the next step


async def issue(guard: GuardSeats, room: str, user: str, limit: int | None = 1) -> None:
    hold_id = await guard.book.take(room, user, limit, ALIAS)
    assert isinstance(hold_id, str)
    await guard.book.issue(room, hold_id, Issued(ALIAS, user, "PHONE"), durable=True)


async def present(guard: GuardSeats, room: str) -> list[str]:
    """The users in the call."""
    snapshot = await guard.book.snapshot(room)
    return [] if snapshot is None else [session.user for session in snapshot.present]


async def join(guard: GuardSeats, room: str, user: str, limit: int) -> bool:
    """A join as admission makes it. :return: whether a token was issued."""
    waited = False
    try:
        while True:
            taken = await guard.book.take(room, user, limit, ALIAS)
            if isinstance(taken, str):
                waited = False
                await guard.book.issue(room, taken, Issued(ALIAS, user), durable=True)
                return True
            if taken is Refusal.FULL:
                return False
            await guard.book.wait_for_seat(room, user, again=waited)
            waited = True
    finally:
        if waited:
            await guard.book.wake_all(room)


@pytest_twisted.ensureDeferred
async def test_four_guards_give_away_exactly_the_seats_there_are(url: str, room: str) -> None:
    async with guards(url, 4) as four:
        await listed(four[0], room, 10)
        joins = [Deferred.fromCoroutine(join(four[n % 4], room, f"@{n}:x", 10)) for n in range(500)]
        let_in = await gatherResults(joins, consumeErrors=True)
        assert sum(let_in) == 10
        assert not any(guard.book.unshared for guard in four)


@pytest_twisted.ensureDeferred
async def test_a_token_issued_by_one_guard_takes_its_seat_at_the_others(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        await listed(first, room, 1)
        await issue(first, room, "a")
        assert await second.book.take(room, "b", 1, ALIAS) is Refusal.FULL
        assert await second.book.owns_seat(room, "a")
        assert await second.book.listed_since(room, [ALIAS]) is not None


@pytest_twisted.ensureDeferred
async def test_a_webhook_that_reaches_one_guard_is_known_to_the_others(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        await listed(first, room, 1)
        await issue(first, room, "a")
        await first.book.arrive(room, ALIAS, Arrival("PA_a", "a", "a"), 1)
        assert await present(second, room) == ["a"]
        await second.book.arrive(room, ALIAS, Arrival("PA_late", "late", "late"), 1)
        assert await first.book.overflow(room, 1) == [OverLimit(ALIAS, "PA_late", "late", "late")]
        await second.book.leave(room, ALIAS, "PA_a", "a", reactor.seconds(), by_choice=True)
        assert await first.book.listing_required_since(room) is not None
        await listed(second, room, 1, "late")
        assert await first.book.overflow(room, 1) == []
        assert await first.book.occupants(room) == {"late"}


@pytest_twisted.ensureDeferred
async def test_a_join_waits_for_a_request_in_flight_at_another_guard(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        await listed(first, room, 1)
        hold_id = await first.book.take(room, "a", 1, ALIAS)
        assert isinstance(hold_id, str)
        assert await second.book.take(room, "b", 1, ALIAS) is Refusal.SEAT_PENDING
        waiting = Deferred.fromCoroutine(second.book.wait_for_seat(room, "b", again=False))
        await first.book.release(room, hold_id)
        await waiting.addTimeout(15, reactor)
        assert isinstance(await second.book.take(room, "b", 1, ALIAS), str)


@pytest_twisted.ensureDeferred
async def test_a_listing_that_began_before_a_departure_says_nothing_about_it(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        await listed(first, room, 1)
        await issue(first, room, "a")
        await first.book.arrive(room, ALIAS, Arrival("PA_a", "a", "a"), 1)
        since = reactor.seconds()
        await first.book.leave(room, ALIAS, "PA_a", "a", reactor.seconds(), by_choice=True)
        await second.book.apply_listing(room, ALIAS, [], 1, since)
        assert await second.book.take(room, "b", 1, ALIAS) is Refusal.FULL
        await listed(second, room, 1)
        assert isinstance(await second.book.take(room, "b", 1, ALIAS), str)


@pytest_twisted.ensureDeferred
async def test_a_step_whose_answer_was_lost_gives_the_same_answer_again(url: str, room: str) -> None:
    async with guards(url, 1) as (guard,):
        steps = RoomSteps(guard.client, reactor, 0.0, guard.rebuilding)
        hold_id = token_hex(8)
        take = ("take", hold_id, "a", 1, ALIAS, False, None, 4.5)
        assert await steps.run(room, take) == await steps.run(room, take) == [["", False]]
        put = ("issue", hold_id, "a", ALIAS, "a", "PHONE", 30.0)
        assert await steps.run(room, put) == await steps.run(room, put)
        rooms = {snapshot.room_id: snapshot for snapshot in await guard.book.snapshots()}
        assert rooms[room].seats_taken == 1
        assert await steps.run(room, take) == [["", False]]
        assert await steps.run(room, ("release", hold_id))
        assert await guard.book.owns_seat(room, "a")


@pytest_twisted.ensureDeferred
async def test_each_guard_knows_the_occupants_after_changes_by_others(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        await listed(first, room, 1)
        assert not await second.book.occupants(room)
        await issue(first, room, "a")
        assert await second.book.occupants(room) == {"a"}
        assert await second.book.take(room, "b", 1, ALIAS) is Refusal.FULL
        assert await second.book.occupants(room) == {"a"}
        await first.book.leave(room, ALIAS, "", "a", reactor.seconds(), by_choice=True)
        await listed(second, room, 1)
        assert not await second.book.occupants(room)
        await issue(second, room, "b")
        assert await first.book.occupants(room) == await second.book.occupants(room) == {"b"}


@pytest_twisted.ensureDeferred
async def test_a_new_guard_knows_the_rooms_of_calls_that_were_listed_lately(url: str, room: str) -> None:
    alias = f"alias of {room}"
    async with guards(url, 1) as (old,):
        await old.book.apply_listing(room, alias, [Arrival("PA_a", "a", "a")], 1, reactor.seconds())
        await old.book.is_started(room)
    async with guards(url, 1) as (new,):
        assert alias in await new.book.kept_aliases()
        await new.client.call("EXPIRE", room_key(room), OCCUPIED_ROOM - int(KEPT_FOR) - 1)  # as if it was long ago
        assert alias not in await new.book.kept_aliases()
        assert not new.book.unshared


@pytest_twisted.ensureDeferred
async def test_a_killed_guard_keeps_what_it_issued_and_loses_what_was_in_flight(url: str, room: str) -> None:
    async with guards(url, 2) as (killed, other):
        await listed(other, room, 2)
        await issue(killed, room, "issued", 2)
        assert isinstance(await killed.book.take(room, "pending", 2, ALIAS), str)
        killed.kill()
        began = reactor.seconds()
        assert await other.book.take(room, "new", 2, ALIAS) is Refusal.SEAT_PENDING
        await Deferred.fromCoroutine(join(other, room, "new", 2)).addTimeout(30, reactor)
        assert reactor.seconds() - began >= LEASE / 2, "a request in flight ended before its time"
        assert await other.book.owns_seat(room, "issued")
        assert await other.book.take(room, "third", 2, ALIAS) is Refusal.FULL


@pytest_twisted.ensureDeferred
async def test_a_request_in_flight_lasts_as_long_as_its_guard(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        await listed(first, room, 1)
        hold_id = await first.book.take(room, "a", 1, ALIAS)
        assert isinstance(hold_id, str)
        end = reactor.seconds() + 1.2 * LEASE
        await until(lambda: reactor.seconds() > end)
        assert await second.book.take(room, "b", 1, ALIAS) is Refusal.SEAT_PENDING
        await first.book.issue(room, hold_id, Issued(ALIAS, "a"), durable=True)
        assert await second.book.take(room, "b", 1, ALIAS) is Refusal.FULL


@pytest_twisted.ensureDeferred
async def test_a_call_is_started_for_all_guards(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        assert not await second.book.is_started(room)
        await first.book.start(room)
        await issue(first, room, "a", None)
        assert await second.book.is_started(room)


@pytest_twisted.ensureDeferred
async def test_sessions_are_recognised_at_the_next_step(url: str, room: str) -> None:
    async with guards(url, 1) as (guard,):
        await listed(guard, room, 1)
        await guard.book.arrive(room, ALIAS, Arrival("PA_x", "hash", "hash"), 1)
        await guard.book.recognise(room, ALIAS, ["hash"], "@a:x")
        assert await present(guard, room) == ["@a:x"]
        assert isinstance(await guard.book.take(room, "@a:x", 1, ALIAS), str)


@pytest.mark.parametrize("exempt", [True, False])
@pytest_twisted.ensureDeferred
async def test_exempt_users_enter_past_the_limit(url: str, room: str, exempt: bool) -> None:
    async with guards(url, 1) as (guard,):
        await listed(guard, room, 1)
        await issue(guard, room, "a")
        taken = await guard.book.take(room, "b", 1, ALIAS, exempt=exempt)
        assert (taken is Refusal.FULL) is not exempt


@pytest_twisted.ensureDeferred
async def test_a_user_who_becomes_exempt_frees_the_seat_at_all_guards(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        await listed(first, room, 1)
        await issue(first, room, "a")
        assert await second.book.take(room, "b", 1, ALIAS) is Refusal.FULL
        await first.book.exempt(room, "a")
        assert await first.book.overflow(room, 1) == []
        assert await second.book.owns_seat(room, "a")
        assert isinstance(await second.book.take(room, "b", 1, ALIAS), str)


@pytest_twisted.ensureDeferred
async def test_one_room_is_told_without_reading_the_others(url: str, room: str) -> None:
    async with guards(url, 2) as (first, second):
        await listed(first, room, 1)
        assert await second.book.snapshot(room) is None
        await issue(first, room, "a")
        snapshot = await second.book.snapshot(room)
        assert snapshot is not None
        assert (snapshot.room_id, snapshot.seats_taken, snapshot.awaited) == (room, 1, ["a"])


@pytest_twisted.ensureDeferred
async def test_seats_stay_shared_while_too_many_calls_wait(
    url: str, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.clients.redis.client.CALLS_AT_ONCE", 8)
    async with guards(url, 1) as (guard,):
        await listed(guard, room, 1)
        asked = [Deferred.fromCoroutine(guard.book.owns_seat(room, f"u{number}")) for number in range(100)]
        shown = Deferred.fromCoroutine(guard.book.snapshots())
        assert [await one for one in asked] == [False] * 100
        await shown
        assert not guard.book.unshared
