# SPDX-License-Identifier: Apache-2.0
"""The seats of all rooms: asked through one interface, each answer one step inside. Floor: guard."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.waiting import tell
from lotusguard.guard.seats.registry import Promise
from lotusguard.guard.seats.store import Store
from lotusguard.metrics import Metrics
from lotusguard.rules.seats import Claim, Refusal, RoomSeats, Session

IDLE_ROOM = 600.0
"""Seconds after which a room where nobody is and nobody is awaited is forgotten."""
ROOMS_KEPT = 20_000
RECONNECTING = 10.0
"""Seconds for which a seat is kept for whose old session the SFU ended for their new one. The new one is listed only a
little later, and is told of when its media flow."""


@frozen
class Present:
    """Somebody in the call, as far as seats go. ``joined`` is when they came, at the latest."""

    sid: str
    identity: str
    user: str
    joined: float = math.inf


class SeatBook(Protocol):
    """Who holds the seats of which Matrix room. Several guards may share one, so every question is awaited, and what
    looks and takes does both in one step."""

    async def take(self, room_id: str, user: str | None, cap: int) -> Claim | Refusal:
        """A seat for a request, or why there is none; ``user`` is ``None`` while not known."""

    async def freed(self, room_id: str, user: str | None, *, again: bool) -> None:
        """Wait until there may be a seat, because a request of this room that was being answered has been.

        Who has waited longest is told first, and alone but for those who hold a seat by now: one request that is
        answered makes place for one.

        :param again: there was none after all; wait at the head of the queue.
        """

    async def waited_in_vain(self, room_id: str) -> None:
        """Somebody who had waited was refused, or gave up: all others who wait may ask again."""

    async def settle(self, room_id: str, claim: Claim, user: str, alias: str, identity: str) -> None:
        """The token was issued: the seat is kept for its user until they arrive or the time is over."""

    async def release(self, room_id: str, claim: Claim) -> None:
        """No token was issued."""

    async def observed_since(self, room_id: str, aliases: Iterable[str]) -> float:
        """When the oldest of the last looks at these SFU rooms began; minus infinity for never."""

    async def doubted_since(self, room_id: str) -> float:
        """When somebody left, or a promise ended, that no look has confirmed yet; minus infinity when none did."""

    async def observe(
        self, room_id: str, alias: str, present: Collection[Present], cap: int | None, since: float
    ) -> None:
        """A complete look at one SFU room, begun at ``since``."""

    async def arrive(self, room_id: str, alias: str, who: Present, cap: int | None) -> None:
        """Somebody came in."""

    async def leave(self, room_id: str, alias: str, sid: str, *, replaced: bool = False) -> None:
        """Somebody went. :param replaced: because their new session is coming."""

    async def overflow(self, room_id: str, cap: int | None) -> Sequence[tuple[Session, str]]:
        """Sessions past the cap with their identities."""

    async def seat_all(self, room_id: str) -> None:
        """Whoever is in has a seat."""

    async def forget(self, room_id: str) -> None:
        """The room has no cap any more; when it gets one again, whoever is in then was there before."""


class MemorySeatBook:
    """The seat book of one guard.

    :param seat_ttl: seconds for which a seat is kept for who was given a token.
    :param store: where promises survive a restart.
    """

    def __init__(self, store: Store | None, clock: IReactorTime, metrics: Metrics, *, seat_ttl: float) -> None:
        self._store = store
        self._clock = clock
        self._seat_ttl = seat_ttl
        self._began = clock.seconds()
        self.rooms: dict[str, RoomSeats] = {}
        self._newcomers: dict[str, set[Session]] = {}
        self._waiting: dict[str, deque[tuple[str | None, Deferred[None]]]] = {}
        metrics.cache_limit.labels("seats").set(ROOMS_KEPT)
        metrics.cache_entries.labels("seats").set_function(lambda: len(self.rooms))
        metrics.seats_held.set_function(lambda: sum(room.held(clock.seconds()) for room in self.rooms.values()))

    def load(self, promises: Iterable[Promise]) -> None:
        """Keep the promises of an earlier run. None is kept longer than one given now."""
        latest = self._clock.seconds() + self._seat_ttl
        for promise in promises:
            self._room(promise.room_id).promise(promise.user, min(promise.expires, latest))

    async def take(self, room_id: str, user: str | None, cap: int) -> Claim | Refusal:
        return self._room(room_id).take(user, cap, self._clock.seconds())

    async def freed(self, room_id: str, user: str | None, *, again: bool) -> None:
        waiter: Deferred[None] = Deferred()
        queue = self._waiting.setdefault(room_id, deque())
        (queue.appendleft if again else queue.append)((user, waiter))
        await waiter

    async def waited_in_vain(self, room_id: str) -> None:
        self._wake_all(room_id)

    async def settle(self, room_id: str, claim: Claim, user: str, alias: str, identity: str) -> None:
        now = self._clock.seconds()
        expires = now + self._seat_ttl
        self._room(room_id).settle(claim, user, (alias, identity), now, expires)
        self._wake(room_id)
        if self._store is not None:
            await self._store.put_promise(room_id, user, expires)

    async def release(self, room_id: str, claim: Claim) -> None:
        room = self.rooms.get(room_id)
        if room is not None:
            room.release(claim)
            self._wake(room_id)
            if claim.user is not None and not claim.in_flight and claim.user not in room.awaited(self._clock.seconds()):
                self._kept(room_id, [claim.user])

    async def observed_since(self, room_id: str, aliases: Iterable[str]) -> float:
        return self._room(room_id).observed_since(aliases)

    async def doubted_since(self, room_id: str) -> float:
        return self._room(room_id).doubted_since(self._clock.seconds())

    async def observe(
        self, room_id: str, alias: str, present: Collection[Present], cap: int | None, since: float
    ) -> None:
        room, now = self._room(room_id), self._clock.seconds()
        awaited = room.awaited(now)
        newcomers = {at for at in self._newcomers.get(room_id, ()) if at.alias == alias}
        room.observe(
            alias, [(who.sid, who.identity, who.user) for who in present], cap, since, now,
            frozenset(at.sid for at in newcomers),
        )  # fmt: skip
        self._no_newcomers(room_id, newcomers)
        self._kept(room_id, awaited - room.awaited(now))

    async def arrive(self, room_id: str, alias: str, who: Present, cap: int | None) -> None:
        room, now = self._room(room_id), self._clock.seconds()
        if alias not in room.observed:
            # The first look, which is about to come, must not take them for one who was there before. News can be
            # late: who came before we were here, or while there was no cap, was.
            if who.joined > max(self._began, room.uncapped):
                self._newcomers.setdefault(room_id, set()).add(Session(alias, who.sid))
            return
        awaited = room.awaited(now)
        room.arrive(Session(alias, who.sid), who.user, who.identity, cap, now, joined=who.joined)
        self._kept(room_id, awaited - room.awaited(now))

    async def leave(self, room_id: str, alias: str, sid: str, *, replaced: bool = False) -> None:
        room, now = self.rooms.get(room_id), self._clock.seconds()
        if room is not None:
            room.leave(Session(alias, sid), now, back_by=now + RECONNECTING if replaced else None)
        self._no_newcomers(room_id, {Session(alias, sid)})

    async def overflow(self, room_id: str, cap: int | None) -> Sequence[tuple[Session, str]]:
        room = self._room(room_id)
        return [(at, room.sessions[at].identity) for at in room.overflow(cap, self._clock.seconds())]

    async def seat_all(self, room_id: str) -> None:
        room = self.rooms.get(room_id)
        if room is not None:
            room.seat_all()

    async def forget(self, room_id: str) -> None:
        self._newcomers.pop(room_id, None)
        room = self.rooms.get(room_id)
        if room is not None:
            room.uncapped = self._clock.seconds()
            room.sessions.clear()
            room.observed.clear()
            room.claims = [claim for claim in room.claims if claim.expires > self._clock.seconds()]

    def prune(self) -> None:
        """Forget rooms that nothing happens in."""
        now = self._clock.seconds()
        for room_id in [r for r, room in self.rooms.items() if now - room.touched > IDLE_ROOM and room.idle(now)]:
            del self.rooms[room_id]
        for room in self.rooms.values():
            room.forget_gone(now)
        if len(self._newcomers) > ROOMS_KEPT:
            self._newcomers.clear()

    def _room(self, room_id: str) -> RoomSeats:
        room = self.rooms.get(room_id)
        if room is None:
            if len(self.rooms) >= ROOMS_KEPT:
                self._make_place()
            room = self.rooms[room_id] = RoomSeats(touched=self._clock.seconds())
        return room

    def _no_newcomers(self, room_id: str, those: set[Session]) -> None:
        left = self._newcomers.get(room_id, set()) - those
        if left:
            self._newcomers[room_id] = left
        else:
            self._newcomers.pop(room_id, None)

    def _make_place(self) -> None:
        now = self._clock.seconds()
        idle = next((room_id for room_id, room in self.rooms.items() if room.idle(now)), next(iter(self.rooms)))
        del self.rooms[idle]
        self._wake_all(idle)  # nobody else would tell them any more

    def _wake_all(self, room_id: str) -> None:
        tell([waiter for _, waiter in self._waiting.pop(room_id, ())], None)

    def _wake(self, room_id: str) -> None:
        queue = self._waiting.pop(room_id, None)
        if queue is None:
            return
        holders = self._room(room_id).holders(self._clock.seconds())
        there = [(user, waiter) for user, waiter in queue if not waiter.called]
        first = next((waiter for user, waiter in there if user not in holders), None)
        called = [waiter for user, waiter in there if user in holders or waiter is first]
        left = deque((user, waiter) for user, waiter in there if user not in holders and waiter is not first)
        if left:
            self._waiting[room_id] = left
        for waiter in called:
            waiter.callback(None)

    def _kept(self, room_id: str, arrived: Iterable[str]) -> None:
        if self._store is not None:
            for user in arrived:
                self._store.drop_promise(room_id, user)
