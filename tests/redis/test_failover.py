# SPDX-License-Identifier: Apache-2.0
"""Guards whose Redis is gone, comes back, comes back empty, or refuses them."""

from __future__ import annotations

import pytest_twisted
from twisted.internet.defer import Deferred

from lotusguard.guard.seats.book import Issued
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.seats import Arrival
from tests.calls import logged, named
from tests.conftest import until

from .conftest import OwnServer
from .guards import GuardSeats, guards, reactor, share_again
from .test_seat_book import ALIAS, issue, listed


@pytest_twisted.ensureDeferred
async def test_without_redis_a_guard_goes_on_alone_with_what_it_issued(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 2) as (first, second):
        await listed(first, room, 2)
        await issue(first, room, "a", 2)
        with logged() as events:
            own_server.stop()
            await until(lambda: not first.client.available)
            await listed(first, room, 2)
            assert await first.book.owns_seat(room, "a")
            await issue(first, room, "b", 2)
            assert await first.book.take(room, "c", 2, ALIAS) is Refusal.FULL
        assert first.book.unshared
        assert len(named(events, "seats_unshared")) == 1
        assert not await second.book.owns_seat(room, "a"), "nobody can have told the other guard"


@pytest_twisted.ensureDeferred
async def test_a_request_in_flight_when_redis_goes_is_issued_all_the_same(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 1) as (guard,):
        await listed(guard, room, 1)
        hold_id = await guard.book.take(room, "a", 1, ALIAS)
        other = await guard.book.take(room, "a", 1, ALIAS)
        assert isinstance(hold_id, str)
        assert isinstance(other, str)
        own_server.stop()
        await guard.book.issue(room, hold_id, Issued(ALIAS, "a"), durable=True)
        await guard.book.release(room, other)
        assert await guard.book.owns_seat(room, "a")


@pytest_twisted.ensureDeferred
async def test_a_redis_that_comes_back_empty_gets_what_every_guard_issued(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 2) as (first, second):
        await listed(first, room, 3)
        await issue(first, room, "before", 3)
        await issue(second, room, "other", 3)
        own_server.stop()
        await until(lambda: not first.client.available and not second.client.available)
        await listed(first, room, 3)
        await issue(first, room, "alone", 3)
        own_server.start_again()
        await share_again(first, second)
        assert await second.book.listed_since(room, [ALIAS]) is None, "a listing from before is trusted"
        await listed(second, room, 3)
        for user in ("before", "other", "alone"):
            assert await first.book.owns_seat(room, user), user
        assert await second.book.take(room, "new", 3, ALIAS) is Refusal.FULL


@pytest_twisted.ensureDeferred
async def test_nobody_new_is_seated_before_the_guards_have_given_back_their_holds(
    own_server: OwnServer, room: str
) -> None:
    async with guards(own_server.url, 2) as (first, second):
        await listed(first, room, 1)
        await issue(second, room, "a")
        own_server.stop()
        await until(lambda: not first.client.available and not second.client.available)
        own_server.start_again()
        await until(lambda: first.client.available, 30)
        taken = Deferred.fromCoroutine(first.book.take(room, "new", 1, ALIAS))
        assert await taken.addTimeout(30, reactor) is Refusal.FULL


@pytest_twisted.ensureDeferred
async def test_a_deleted_data_set_is_noticed(own_server: OwnServer, room: str) -> None:
    async with guards(own_server.url, 1) as (guard,):
        await issue(guard, room, "a", None)
        own_server.client.flushall()
        await until(lambda: not guard.rebuilding.complete)
        await until(lambda: guard.rebuilding.complete)
        assert await guard.book.owns_seat(room, "a")


@pytest_twisted.ensureDeferred
async def test_who_got_in_while_the_guards_were_alone_is_over_the_limit_afterwards(
    own_server: OwnServer, room: str
) -> None:
    async with guards(own_server.url, 2) as (first, second):
        await listed(first, room, 1)
        own_server.stop()
        await until(lambda: not first.client.available and not second.client.available)
        for guard, user in ((first, "a"), (second, "b")):
            await listed(guard, room, 1)
            await issue(guard, room, user)
        own_server.start_again()
        await share_again(first, second)
        who = [Arrival(f"PA_{user}", user, user, reactor.seconds()) for user in ("a", "b")]
        await first.book.apply_listing(room, ALIAS, who, 1, reactor.seconds() + 0.001)
        await first.book.is_started(room)  # a listing is applied with the next step
        over = await second.book.overflow(room, 1)
        assert [hold.user for hold in over] in (["a"], ["b"])
        assert await second.book.take(room, "c", 1, ALIAS) is Refusal.FULL


@pytest_twisted.ensureDeferred
async def test_a_wrong_password_is_named_and_the_guard_works_alone(own_server: OwnServer, room: str) -> None:
    own_server.client.config_set("requirepass", "right")
    with logged() as events:
        guard = GuardSeats.start(f"redis://:wrong@127.0.0.1:{own_server.port}")
        try:
            await until(lambda: guard.client.fault == "wrong_password")
            await listed(guard, room, 1)
            await issue(guard, room, "a")
            assert await guard.book.take(room, "b", 1, ALIAS) is Refusal.FULL
        finally:
            guard.kill()
    lost = named(events, "redis_lost")
    assert len(lost) == 1
    assert "GUARD_REDIS_URL" in lost[0]
    assert "wrong" not in lost[0].replace("wrong_password", "")
