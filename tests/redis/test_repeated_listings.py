# SPDX-License-Identifier: Apache-2.0
"""A listing that shows the same as the last one is applied only if some guard has changed something since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from attrs import define, field
from twisted.internet.defer import Deferred

from lotusguard.rules.seats import Arrival

from .direct import DirectGuard, Server
from .test_crashes import outcome_of
from .test_seat_book import ALIAS

ROOM, LIMIT = "!again", 3


@define(eq=False)
class World:
    """Two guards over one Valkey. :ivar applied: how often the first guard applied a listing as a whole."""

    server: Server = field(init=False, factory=Server)
    guards: list[DirectGuard] = field(init=False)
    applied: int = field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self.server.replace({})
        self.guards = [DirectGuard(self.server) for _ in range(2)]
        self.pass_time(6.0)

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            self.server.now += 0.5
            for guard in self.guards:
                guard.clock.advance(0.5)
                outcome_of(guard.upkeep())

    def list(self, *users: str) -> None:
        """The first guard lists the call, as the roster does, and asks a question."""
        self.pass_time(1.0)
        book, since = self.guards[0].book, self.guards[0].clock.seconds()

        async def apply() -> None:
            self.applied += 1
            await book.apply_listing(ROOM, ALIAS, [Arrival(f"PA_{user}", user, user) for user in users], LIMIT, since)

        async def work() -> None:
            if not await book.listed_again(ROOM, ALIAS, LIMIT, since, apply):
                await apply()
            await book.is_started(ROOM)

        outcome_of(work())

    def list_elsewhere(self, *users: str) -> None:
        """The second guard lists the call."""
        self.pass_time(1.0)
        book, since = self.guards[1].book, self.guards[1].clock.seconds()
        who = [Arrival(f"PA_{user}", user, user) for user in users]
        outcome_of(book.apply_listing(ROOM, ALIAS, who, LIMIT, since))
        outcome_of(book.is_started(ROOM))

    @property
    def present(self) -> Sequence[str]:
        _, snapshot = outcome_of(self.guards[1].book.snapshot(ROOM))
        return sorted(session.user for session in snapshot.present)

    @property
    def listed_since(self) -> float:
        """When the last listing began that the second guard knows of, on the server's clock."""
        outcome_of(self.guards[1].book.is_started(ROOM))
        _, since = outcome_of(self.guards[1].book.listed_since(ROOM, [ALIAS]))
        return float(since) - self.guards[1].clock.seconds() + self.server.now


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    for _ in range(2):
        world.list("a")
    assert world.applied == 2, "the first one brought somebody"
    yield world
    world.server.replace({})


def test_a_listing_after_which_nothing_has_changed_counts_for_all_guards_without_being_applied(world: World) -> None:
    before = world.listed_since
    for _ in range(3):
        world.list("a")
    assert world.applied == 2
    assert world.listed_since >= before + 3.0


def test_a_listing_is_applied_if_another_guard_has_changed_something(world: World) -> None:
    arrival = Arrival("PA_b", "b", "b")
    outcome_of(world.guards[1].book.arrive(ROOM, ALIAS, arrival, LIMIT))
    world.list("a")
    assert world.applied == 3
    assert world.present == ["a"], "the listing began after that arrival"


def test_a_listing_is_applied_if_another_guard_has_listed_others_since(world: World) -> None:
    for _ in range(2):
        world.list_elsewhere("a", "b")
    world.list("a")
    assert world.applied == 3
    assert world.present == ["a"]


def test_a_listing_is_applied_if_time_has_changed_something(world: World) -> None:
    outcome_of(world.guards[0].book.leave(ROOM, ALIAS, "PA_a", "a", world.guards[0].clock.seconds(), by_choice=False))
    world.list_elsewhere()
    for _ in range(2):
        world.list()
    applied = world.applied
    world.list()
    assert world.applied == applied
    world.pass_time(30.0)
    world.list()
    assert world.applied == applied + 1, "the time to come back is over"


@pytest.mark.parametrize("same_server", [True, False])
def test_a_listing_is_applied_after_the_data_were_lost(world: World, same_server: bool) -> None:
    world.server.replace({}, same_server=same_server)
    if not same_server:
        for guard in world.guards:
            guard.client.connected = False
    world.list("a")
    assert world.applied == 3
    assert world.present == ["a"]


@define(eq=False)
class Lister:
    """A guard that lists the call and remembers the last listing that it applied, as `Roster` does."""

    world: World
    applied: tuple[str, ...] = ()

    def list(self, *users: str) -> None:
        self.world.pass_time(1.0)
        book, since = self.world.guards[0].book, self.world.guards[0].clock.seconds()

        async def apply() -> None:
            who = [Arrival(f"PA_{user}", user, user) for user in users]
            await book.apply_listing(ROOM, ALIAS, who, LIMIT, since)
            self.applied = users

        async def work() -> None:
            if self.applied != users or not await book.listed_again(ROOM, ALIAS, LIMIT, since, apply):
                await apply()

        outcome_of(work())
        self.world.guards[0].clock.advance(0)  # the end of the turn, when it is sent


@pytest.mark.parametrize("lost", [True, False], ids=["connection lost", "writes rejected"])
def test_what_was_listed_while_a_guard_was_alone_reaches_the_others(world: World, lost: bool) -> None:
    lister, guard = Lister(world), world.guards[0]
    for _ in range(3):
        lister.list("a", "b")
    if lost:
        world.server.up = guard.client.connected = False
    else:
        guard.client.rejects = True
        outcome_of(guard.book.owns_seat("!another", "x"))  # this guard is alone from here on
    for _ in range(2):
        lister.list("a")
    world.server.up, guard.client.rejects = True, False
    world.pass_time(3.0)
    assert not guard.book.unshared
    outcome_of(guard.book.is_started(ROOM))  # an answer that tells the version, which is the old one
    lister.list("a")
    world.pass_time(1.0)
    assert world.present == ["a"]


def test_a_late_answer_about_an_older_listing_settles_nothing(world: World) -> None:
    lister, client = Lister(world), world.guards[0].client
    lister.list("a", "b")
    late: Deferred[None] = Deferred()
    client.answers_late = late
    lister.list("a", "b")
    client.answers_late, client.rejects = None, True
    lister.list("a")
    client.rejects = False
    late.callback(None)
    lister.list("a")
    world.pass_time(1.0)
    assert world.present == ["a"]


def test_a_listing_that_had_to_be_applied_comes_before_what_was_asked(world: World) -> None:
    outcome_of(world.guards[1].book.arrive(ROOM, ALIAS, Arrival("PA_b", "b", "b"), LIMIT))
    world.pass_time(1.0)
    book, since = world.guards[0].book, world.guards[0].clock.seconds()

    async def apply() -> None:
        await book.apply_listing(ROOM, ALIAS, [Arrival("PA_a", "a", "a")], LIMIT, since)

    async def shown() -> Sequence[str]:
        assert await book.listed_again(ROOM, ALIAS, LIMIT, since, apply), "as far as this guard knows"
        snapshot = await book.snapshot(ROOM)
        assert snapshot is not None
        return [session.user for session in snapshot.present]

    assert outcome_of(shown()) == (True, ["a"])
