# SPDX-License-Identifier: Apache-2.0
"""The seat book that several guards share: every question and every change is one script in Valkey or Redis."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from secrets import token_hex
from typing import Any

from attrs import define, field

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient
from lotusguard.clients.waiting import gather_in_turns
from lotusguard.guard.seats.book import KEPT_FOR, Issued, OverLimit, Presence, RoomSnapshot
from lotusguard.guard.seats.memory import SLOTS_PER_ROOM
from lotusguard.guard.seats.redis.epoch import Rebuilding
from lotusguard.guard.seats.redis.notes import Listed
from lotusguard.guard.seats.redis.occupants import KnownOccupants
from lotusguard.guard.seats.redis.own import OwnHold, OwnHolds
from lotusguard.guard.seats.redis.rooms import StoredRooms
from lotusguard.guard.seats.redis.scripts import WAKE_CHANNEL
from lotusguard.guard.seats.redis.steps import ATTEMPTS, DATA_LOST, RoomSteps
from lotusguard.guard.seats.redis.waiting import WaitingJoins
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.seats import Arrival, HoldState

PENDING_LEASE = 4.5
"""Seconds after which a request in flight ends unless its guard renews it."""
RENEW_INTERVAL = 1.5
LISTED_TRUSTED = 2.0
"""Seconds for which the last answer about a room's SFU rooms serves again."""
ROOMS_SHOWN = 2_000
ROOMS_ASKED = 100_000
"""Rooms that are looked at for `RedisSeatBook.kept_aliases`."""
ROOMS_AT_ONCE = 32
"""Rooms that one question about many of them works on at the same time. Joins need the other calls."""


@define(eq=False)
class RedisSeatBook:
    """See `lotusguard.guard.seats.book.SeatBook`. Every method may raise `DependencyFailed`.

    :param guarding_since: see `MemorySeatBook`.
    :param own: gets what this guard issues.
    :param lease: seconds after which a request in flight ends unless its guard renews it.
    """

    _redis: RedisClient
    _reactor: Any
    _seat_ttl: float
    _guarding_since: float
    _rebuilding: Rebuilding
    _own: OwnHolds
    _lease: float = PENDING_LEASE
    unshared: bool = field(init=False, default=False)
    is_remote: bool = field(init=False, default=True)
    _steps: RoomSteps = field(init=False)
    _waiting: WaitingJoins = field(init=False)
    _rooms: StoredRooms = field(init=False)
    _pending: dict[str, tuple[str, str]] = field(init=False, factory=dict)
    """The room and the user of each request in flight of this guard, by the ID of its hold."""
    _occupants: KnownOccupants = field(init=False, factory=KnownOccupants)

    def __attrs_post_init__(self) -> None:
        self._steps = RoomSteps(self._redis, self._reactor, self._guarding_since, self._rebuilding)
        self._waiting = WaitingJoins(self._owners, self._reactor)
        self._rooms = StoredRooms(self._redis, self._reactor)
        self._redis.listen(WAKE_CHANNEL, self._waiting.wake)
        self._redis.on_server.append(lambda _: self._steps.forget_time())
        self._rebuilding.on_data_set += [self._steps.forget, self._occupants.clear]

    # -- joins -------------------------------------------------------------------------------------------

    async def take(
        self, room_id: str, user: str, limit: int | None, alias: str, *, exempt: bool = False, new_slot: bool = False
    ) -> str | Refusal:
        hold_id = token_hex(8)
        operation = (
            "take", hold_id, user, limit, alias, exempt, SLOTS_PER_ROOM if new_slot else None, self._lease,
            self._occupants.number(room_id),
        )  # fmt: skip
        self._pending[hold_id] = (room_id, user)  # renewed from now on: the answer may take long
        taken, step = False, self._step if limit is None or exempt else self._certain_step
        try:
            refusal = self._refusal(room_id, user, await step(room_id, *operation))
            taken = not refusal
        finally:
            if not taken:
                self._pending.pop(hold_id, None)
        return hold_id if taken else Refusal(refusal)

    async def _certain_step(self, room_id: str, name: str, hold_id: str, *arguments: Any) -> Any:
        """Take one of a limited number of seats. It is taken only from a data set that is complete."""
        for left in reversed(range(ATTEMPTS)):
            await self._rebuilding.wait()
            try:
                return (await self._steps.run(room_id, (name, hold_id, *arguments), certain=True))[0]
            except DependencyFailed as failed:
                if failed.reason != DATA_LOST or not left:
                    raise
            await self._steps.run(room_id, ("release", hold_id))
            await self._rebuilding.look_again()
        raise AssertionError("not reached")

    def _refusal(self, room_id: str, user: str, told: Sequence[Any]) -> str:
        """Note who holds the seats of a full room. :return: why there is no seat; "" if there is one."""
        refusal, full = told
        if full:
            *found, occupants = full
            self._steps.notes.note_full(room_id, user, found)
            self._occupants.update(room_id, occupants)
        return str(refusal)

    async def wait_for_seat(self, room_id: str, user: str, *, again: bool) -> None:
        await self._waiting.wait(room_id, user, again=again)

    async def wake_all(self, room_id: str) -> None:
        self._waiting.wake_all(room_id)

    async def issue(self, room_id: str, hold_id: str, token: Issued, *, durable: bool) -> None:
        _, user = self._pending.pop(hold_id, ("", ""))
        await self._issue("issue", room_id, hold_id, user, token)

    async def issue_without_seat(self, room_id: str, user: str, token: Issued) -> None:
        await self._issue("issue_without_seat", room_id, token_hex(8), user, token)

    async def _issue(self, operation: str, room_id: str, hold_id: str, user: str, token: Issued) -> None:
        user, state, expires = await self._step(
            room_id, operation, hold_id, user, token.alias, token.identity, token.device, self._seat_ttl
        )
        seated = state != HoldState.ISSUED_UNSEATED.value
        self._own.note(hold_id, OwnHold(room_id, user, token, self._steps.clock.to_guard(float(expires)), seated))

    async def release(self, room_id: str, hold_id: str) -> None:
        if self._pending.pop(hold_id, None) is not None:  # else it was issued, or is not ours
            await self._step(room_id, "release", hold_id)

    async def owns_seat(self, room_id: str, user: str) -> bool:
        full = self._steps.notes.full(room_id)
        if full is not None and full.user == user and not full.has_strangers:
            return False
        return bool(await self._step(room_id, "owns_seat", user))

    async def exempt(self, room_id: str, user: str) -> None:
        self._steps.first(room_id, ("exempt", user))  # a step that takes a seat or looks for an overflow follows

    async def recognise(self, room_id: str, alias: str, identities: Collection[str], user: str) -> None:
        full = self._steps.notes.full(room_id)
        if full is None or full.has_strangers:
            self._steps.first(room_id, ("recognise", alias, list(identities), user))

    # -- the call ----------------------------------------------------------------------------------------

    async def arrive(self, room_id: str, alias: str, who: Arrival, limit: int | None) -> None:
        await self._steps.know_time()
        await self._step(room_id, "arrive", alias, self._arrival(who), limit)

    async def leave(
        self, room_id: str, alias: str, sid: str, identity: str, left_by: float, *, by_choice: bool
    ) -> None:
        await self._steps.know_time()
        left_by = self._steps.clock.to_server(left_by)
        await self._step(room_id, "leave", alias, sid, identity, left_by, by_choice)

    async def apply_listing(
        self, room_id: str, alias: str, present: Collection[Arrival], limit: int | None, since: float
    ) -> None:
        await self._steps.know_time()
        arrivals, since = [self._arrival(who) for who in present], self._steps.clock.to_server(since)
        operation = ("apply_listing", alias, arrivals, limit, since)
        self._steps.apply_listing(room_id, alias, since, operation)

    async def listed_again(
        self, room_id: str, alias: str, limit: int | None, since: float, apply: Callable[[], Awaitable[None]]
    ) -> bool:
        version = self._steps.notes.settled(room_id, alias)
        if version is None:
            return False
        await self._steps.know_time()
        since = self._steps.clock.to_server(since)
        operation = ("listed_again", alias, limit, since, version)
        self._steps.listed_again(room_id, alias, since, operation, apply)
        return True

    async def overflow(self, room_id: str, limit: int | None) -> Sequence[OverLimit]:
        return [OverLimit(*hold) for hold in await self._step(room_id, "overflow", limit)]

    async def seat_everybody(self, room_id: str) -> None:
        await self._step(room_id, "seat_everybody")

    # -- questions ---------------------------------------------------------------------------------------

    async def aliases(self, room_id: str) -> Collection[str]:
        """Those that Redis told of last. If that was long ago it is asked, and the next answer is right."""
        known = self._steps.notes.listed(room_id)
        if known is None or not self._is_recent(known):
            self._steps.ask_soon(room_id)
        return () if known is None else known.aliases

    async def listed_since(self, room_id: str, aliases: Collection[str]) -> float | None:
        """As far as this guard knows. What another guard listed since the last step is missed: one more is made."""
        known = self._steps.notes.listed(room_id)
        since = [] if known is None else [known.since.get(alias) for alias in aliases]
        if None in since or not since:
            return None
        await self._steps.know_time()
        return self._steps.clock.to_guard(min(at for at in since if at is not None))

    def _is_recent(self, known: Listed) -> bool:
        return bool(self._reactor.seconds() - known.told <= LISTED_TRUSTED)

    async def listing_required_since(self, room_id: str) -> float | None:
        full = self._steps.notes.full(room_id)
        required = await self._step(room_id, "listing_required_since") if full is None else full.required_since
        return self._steps.clock.to_guard(float(required)) if required else None

    async def occupants(self, room_id: str) -> Collection[str]:
        number, known = self._occupants.number(room_id), self._steps.notes.listed(room_id)
        if self._steps.notes.full(room_id) is not None and known is not None and known.news == number:
            return self._occupants.names(room_id)
        found = self._occupants.update(room_id, await self._step(room_id, "occupants", number))
        return found if found is not None else set((await self._step(room_id, "occupants", None))[1])

    async def is_started(self, room_id: str) -> bool:
        return bool(await self._step(room_id, "is_started"))

    async def start(self, room_id: str) -> None:
        self._steps.first(room_id, ("start",))  # it is followed by a step that takes or issues

    async def kept_aliases(self) -> Collection[str]:
        kept: set[str] = set()

        async def read(room_id: str) -> None:
            if await self._rooms.was_occupied(room_id, KEPT_FOR):
                await self._step(room_id, "nothing")
                known = self._steps.notes.listed(room_id)
                kept.update(known.aliases if known is not None else ())

        await gather_in_turns(ROOMS_AT_ONCE, read, await self._rooms.ids(ROOMS_ASKED))
        return kept

    async def snapshots(self) -> Sequence[RoomSnapshot]:
        found = await gather_in_turns(ROOMS_AT_ONCE, self.snapshot, await self._rooms.ids(ROOMS_SHOWN))
        return sorted((one for one in found if one is not None), key=lambda snapshot: snapshot.room_id)

    async def snapshot(self, room_id: str) -> RoomSnapshot | None:
        idle, taken, awaited, present = await self._step(room_id, "snapshot")
        if idle:
            return None
        return RoomSnapshot(room_id, int(taken), sorted(awaited), [Presence(*session) for session in present])

    # -- upkeep ------------------------------------------------------------------------------------------

    async def renew(self) -> None:
        """Renew the requests in flight of this guard; call it every `RENEW_INTERVAL`."""
        rooms: dict[str, list[str]] = {}
        for hold_id, (room_id, _) in self._pending.items():
            rooms.setdefault(room_id, []).append(hold_id)

        async def renew(room_id: str) -> None:
            await self._step(room_id, "renew", rooms[room_id], self._lease)

        await gather_in_turns(ROOMS_AT_ONCE, renew, list(rooms))

    async def give_back(self, holds: Collection[tuple[str, OwnHold]]) -> None:
        """Give holds to a Redis that may have lost them."""
        await self._steps.know_time()
        now, rooms = self._reactor.seconds(), dict[str, list[Any]]()
        for hold_id, own in holds:
            if own.expires > now and own.token.identity:
                expires = self._steps.clock.to_server(own.expires)
                token = own.token
                operation = (
                    "restore", hold_id, own.user, token.alias, token.identity, expires, own.seated, token.device
                )  # fmt: skip
                rooms.setdefault(own.room_id, []).append(operation)

        async def restore(room_id: str) -> None:
            await self._steps.run(room_id, *rooms[room_id])

        await gather_in_turns(ROOMS_AT_ONCE, restore, list(rooms))

    def forget_settled(self) -> None:
        """Apply the next listing of every SFU room as a whole: the last ones were applied to another book."""
        self._steps.notes.forget_settled()

    def stop(self) -> None:
        self._waiting.stop()

    async def _owners(self, room_id: str, users: Sequence[str]) -> Sequence[str]:
        owns = await self._steps.run(room_id, *(("owns_seat", user) for user in users))
        return [user for user, owned in zip(users, owns, strict=True) if owned]

    async def _step(self, room_id: str, *operation: Any) -> Any:
        return (await self._steps.run(room_id, operation))[0]

    def _arrival(self, who: Arrival) -> tuple[str, str, str, float | None]:
        joined = None if who.joined is None else self._steps.clock.to_server(who.joined)
        return who.sid, who.identity, who.user, joined
