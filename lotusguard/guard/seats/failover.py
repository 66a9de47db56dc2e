# SPDX-License-Identifier: Apache-2.0
"""The seat book of a guard that shares its seats: the shared book, or one in memory while Redis gives no answer.

Alone, a guard knows who is in the calls, because it lists them, and which tokens it issued itself. It does not know the
tokens of other guards, so more people may get in than there are seats. They are removed once Redis is back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from secrets import token_hex
from typing import Any

from attrs import define, field, frozen
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient
from lotusguard.clients.redis.faults import NOT_CONNECTED
from lotusguard.guard.seats.book import Issued, OverLimit, RoomSnapshot, SeatBook
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.guard.seats.redis.book import RedisSeatBook
from lotusguard.guard.seats.redis.own import OwnHold, OwnHolds
from lotusguard.guard.seats.store import StoredHold
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.seats import Arrival

log = Logger()


@frozen
class _Taken:
    """A request in flight. :ivar book: where its hold is."""

    book: SeatBook
    user: str


@define(eq=False)
class FailoverSeatBook:
    """See `lotusguard.guard.seats.book.SeatBook`. No method fails because of Redis.

    :param new_alone: makes an empty book for a time without Redis.
    :param wall: seconds since the epoch.
    :ivar on_shared: called when this guard, after it was alone, shares its seats again.
    """

    _redis: RedisClient
    _shared: RedisSeatBook
    _new_alone: Callable[[], MemorySeatBook]
    _own: OwnHolds
    _clock: IReactorTime
    _wall: Callable[[], float]
    _seat_ttl: float
    on_shared: list[Callable[[], None]] = field(init=False, factory=list)
    _alone: MemorySeatBook | None = field(init=False, default=None)
    _waited_in: set[str] = field(init=False, factory=set)
    _taken: dict[str, _Taken] = field(init=False, factory=dict)

    @property
    def unshared(self) -> bool:
        """Whether this guard decides alone."""
        return self._alone is not None

    @property
    def is_remote(self) -> bool:
        return self._alone is None

    # -- joins -------------------------------------------------------------------------------------------

    async def take(
        self, room_id: str, user: str, limit: int | None, alias: str, *, exempt: bool = False, new_slot: bool = False
    ) -> str | Refusal:
        book: SeatBook = self._shared
        try:
            await self._check()
            taken = await self._shared.take(room_id, user, limit, alias, exempt=exempt, new_slot=new_slot)
        except DependencyFailed as failed:
            book = self._go_alone(failed)
            taken = await book.take(room_id, user, limit, alias, exempt=exempt, new_slot=new_slot)
        if not isinstance(taken, Refusal):
            self._taken[taken] = _Taken(book, user)
        return taken

    async def wait_for_seat(self, room_id: str, user: str, *, again: bool) -> None:
        if self._alone is None:
            await self._shared.wait_for_seat(room_id, user, again=again)
        else:
            self._waited_in.add(room_id)
            await self._alone.wait_for_seat(room_id, user, again=again)

    async def wake_all(self, room_id: str) -> None:
        await self._shared.wake_all(room_id)
        if self._alone is not None:
            await self._alone.wake_all(room_id)

    async def issue(self, room_id: str, hold_id: str, token: Issued, *, durable: bool) -> None:
        taken = self._taken.pop(hold_id, None)
        if taken is None:
            return
        if taken.book is self._shared:
            try:
                await self._check()
                await self._shared.issue(room_id, hold_id, token, durable=durable)
            except DependencyFailed as failed:
                self._own_alone(self._go_alone(failed), room_id, hold_id, taken.user, token)
            return
        await taken.book.issue(room_id, hold_id, token, durable=durable)
        expires = self._clock.seconds() + self._seat_ttl
        self._own.note(hold_id, OwnHold(room_id, taken.user, token, expires, seated=False))
        if self._alone is None:  # Redis came back while upstream was asked
            await self._give_back_soon(hold_id)

    async def issue_without_seat(self, room_id: str, user: str, token: Issued) -> None:
        await self._either("issue_without_seat", room_id, user, token)

    async def release(self, room_id: str, hold_id: str) -> None:
        taken = self._taken.pop(hold_id, None)
        if taken is None:
            return
        with suppress(DependencyFailed):  # it ends by itself, because nobody renews it
            await taken.book.release(room_id, hold_id)

    async def owns_seat(self, room_id: str, user: str) -> bool:
        return bool(await self._either("owns_seat", room_id, user))

    async def exempt(self, room_id: str, user: str) -> None:
        await self._either("exempt", room_id, user)

    async def recognise(self, room_id: str, alias: str, identities: Collection[str], user: str) -> None:
        await self._either("recognise", room_id, alias, identities, user)

    # -- the call ----------------------------------------------------------------------------------------

    async def arrive(self, room_id: str, alias: str, who: Arrival, limit: int | None) -> None:
        await self._either("arrive", room_id, alias, who, limit)

    async def leave(
        self, room_id: str, alias: str, sid: str, identity: str, left_by: float, *, by_choice: bool
    ) -> None:
        await self._either("leave", room_id, alias, sid, identity, left_by, by_choice=by_choice)

    async def apply_listing(
        self, room_id: str, alias: str, present: Collection[Arrival], limit: int | None, since: float
    ) -> None:
        await self._either("apply_listing", room_id, alias, present, limit, since)

    async def listed_again(
        self, room_id: str, alias: str, limit: int | None, since: float, apply: Callable[[], Awaitable[None]]
    ) -> bool:
        return bool(await self._either("listed_again", room_id, alias, limit, since, apply))

    async def overflow(self, room_id: str, limit: int | None) -> Sequence[OverLimit]:
        over: Sequence[OverLimit] = await self._either("overflow", room_id, limit)
        return over

    async def seat_everybody(self, room_id: str) -> None:
        await self._either("seat_everybody", room_id)

    # -- questions ---------------------------------------------------------------------------------------

    async def aliases(self, room_id: str) -> Collection[str]:
        aliases: Collection[str] = await self._either("aliases", room_id)
        return aliases

    async def kept_aliases(self) -> Collection[str]:
        kept: Collection[str] = await self._either("kept_aliases")
        return kept

    async def listed_since(self, room_id: str, aliases: Collection[str]) -> float | None:
        since: float | None = await self._either("listed_since", room_id, aliases)
        return since

    async def listing_required_since(self, room_id: str) -> float | None:
        since: float | None = await self._either("listing_required_since", room_id)
        return since

    async def occupants(self, room_id: str) -> Collection[str]:
        occupants: Collection[str] = await self._either("occupants", room_id)
        return occupants

    async def is_started(self, room_id: str) -> bool:
        return bool(await self._either("is_started", room_id))

    async def start(self, room_id: str) -> None:
        await self._either("start", room_id)

    async def snapshot(self, room_id: str) -> RoomSnapshot | None:
        snapshot: RoomSnapshot | None = await self._either("snapshot", room_id)
        return snapshot

    async def snapshots(self) -> Sequence[RoomSnapshot]:
        snapshots: Sequence[RoomSnapshot] = await self._either("snapshots")
        return snapshots

    # -- upkeep ------------------------------------------------------------------------------------------

    async def prune(self) -> None:
        """Forget what is old; Redis does so itself."""
        if self._alone is not None:
            await self._alone.prune()

    async def give_back(self) -> None:
        """Give Redis what this guard issued lately, and share the seats again.

        :raises DependencyFailed: Redis gives no usable answer.
        """
        await self._shared.give_back(self._own.unexpired())
        alone, self._alone = self._alone, None
        if alone is None:
            return
        self._shared.forget_settled()
        log.info("seats are shared with the other guards again", event_name="seats_shared")
        waited_in, self._waited_in = self._waited_in, set()
        for room_id in waited_in:
            await alone.wake_all(room_id)
        for told in self.on_shared:
            told()

    async def renew(self) -> None:
        """Renew the requests in flight, and share the seats again after a short failure."""
        if not self._redis.available:
            return
        with suppress(DependencyFailed):  # it is tried again soon
            await self._shared.renew()
            if self._alone is not None:
                await self._redis.probe()  # a server that only reads would be given nothing back
                await self.give_back()

    async def _give_back_soon(self, hold_id: str) -> None:
        held = [(own_id, own) for own_id, own in self._own.unexpired() if own_id == hold_id]
        with suppress(DependencyFailed):  # all of them are given back with the next connection
            await self._shared.give_back(held)

    async def _either(self, name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            await self._check()
            return await getattr(self._shared, name)(*args, **kwargs)
        except DependencyFailed as failed:
            return await getattr(self._go_alone(failed), name)(*args, **kwargs)

    async def _check(self) -> None:
        """:raises DependencyFailed: it is known already that Redis gives no answer; asking would only take time."""
        if self._alone is not None or not self._redis.available:
            if self._alone is None and self._redis.fault == NOT_CONNECTED:  # the guard has just been started
                await self._redis.connected_again()
                return
            raise DependencyFailed("redis", self._redis.fault or "not_shared")

    def _go_alone(self, failed: DependencyFailed) -> MemorySeatBook:
        if self._alone is None:
            log.error(
                "seats are not shared with the other guards: Redis gives no answer ({reason})", reason=failed.reason,
                event_name="seats_unshared",
            )  # fmt: skip
            self._alone = self._new_alone()
            for hold_id, own in self._own.unexpired():
                self._own_alone(self._alone, own.room_id, hold_id, own.user, own.token, own.expires)
        return self._alone

    def _own_alone(
        self, alone: MemorySeatBook, room_id: str, hold_id: str, user: str, token: Issued, expires: float | None = None
    ) -> None:
        """Put an issued hold into the book in memory."""
        if expires is None:
            expires = self._clock.seconds() + self._seat_ttl
            self._own.note(hold_id, OwnHold(room_id, user, token, expires, seated=True))
        left = expires - self._clock.seconds()
        alone.load([
            StoredHold(room_id, user, token.alias, token.identity, token.device, False, self._wall() + left)
        ])  # fmt: skip


def guard_name() -> str:
    """A name that no other guard has."""
    return token_hex(6)
