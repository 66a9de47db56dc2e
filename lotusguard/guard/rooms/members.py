# SPDX-License-Identifier: Apache-2.0
"""Who is joined to which room: one small lookup per user and room, shared, cached like a policy."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from attrs import define, field, frozen
from cachetools import LRUCache
from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Deadline, FreshLookups
from lotusguard.guard.rooms.source import NOTHING_PUSHED, PushedRooms, RoomStateSource
from lotusguard.metrics import Metrics
from lotusguard.rules.membership import Membership

MEMBERSHIPS_KEPT = 32 * 1024 * 1024
"""Bytes."""
ENTRY_SIZE = 400
"""Bytes that an entry costs beside its names."""
LOOKUP_SPACING = 0.1
"""Seconds between two lookups of the same user and room, at least: requests in between share one."""
SECOND_LOOK = 0.25
"""Seconds after which "not a member" is read again: joining a room and its call happen in the same breath."""
FEDERATION_LOOK = 0.5
"""The same for users of other homeservers without any entry: federation lags. Repeated until the deadline."""


class _Key(NamedTuple):
    room_id: str
    user: str


@frozen
class KnownMembership:
    """A membership, or ``None`` while it is unknown.

    :ivar began: when the lookup began that returned it. :ivar reason: why it is unknown.
    """

    membership: Membership | None
    began: float = 0.0
    reason: str = ""


@define(eq=False)
class Members:
    """Memberships of users of whatever homeserver, as far as ours knows.

    :param ttl: seconds for which a membership is believed.
    :param pushed: rooms whose memberships are pushed. There, "joined" is believed without a TTL.
    """

    _source: RoomStateSource
    _clock: IReactorTime
    _metrics: Metrics
    ttl: float
    _pushed: PushedRooms = NOTHING_PUSHED
    _known: LRUCache[_Key, KnownMembership] = field(init=False)
    _changed: LRUCache[tuple[str, str], float] = field(factory=lambda: LRUCache(50_000), init=False)
    _all_changed: float = field(default=0.0, init=False)
    _departures: LRUCache[str, int] = field(factory=lambda: LRUCache(20_000), init=False)
    _lookups: FreshLookups[_Key, Membership] = field(init=False)
    _lists: FreshLookups[str, Collection[str] | None] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._known = LRUCache(MEMBERSHIPS_KEPT, getsizeof=lambda entry: ENTRY_SIZE + 2 * 255)
        self._lookups = FreshLookups(self._look_up, self._clock, spacing=LOOKUP_SPACING)
        self._lists = FreshLookups(self._source.members, self._clock, spacing=LOOKUP_SPACING)
        self._metrics.cache_limit.labels("memberships").set(MEMBERSHIPS_KEPT // (ENTRY_SIZE + 2 * 255))
        self._metrics.cache_entries.labels("memberships").set_function(self._known.__len__)

    async def get(
        self, room_id: str, user: str, deadline: Deadline, since: float | None = None, max_age: float | None = None,
        not_before: float = 0.0,
    ) -> KnownMembership:  # fmt: skip
        """A user's membership. Never fails, and never waits beyond the deadline.

        :param since: the lookup must have begun at this time or later.
        :param not_before: the same, but a membership that is pushed counts too.
        :param max_age: seconds for which a membership is believed here, instead of the TTL.
        """
        if since is None and self._pushed.is_joined(room_id, user):
            return KnownMembership(Membership.JOIN, self._clock.seconds())
        key = _Key(room_id, user)
        needed = max(self._oldest(key, self.ttl if max_age is None else max_age), since or 0.0, not_before)
        known = self._known.get(key)
        if known is not None and known.began >= needed:
            return known
        try:
            fetched = await deadline.wait(self._lookups.get(key, needed))
        except TimeoutError:
            return KnownMembership(None, reason="timeout")
        except DependencyFailed as failed:
            return KnownMembership(None, reason=failed.reason)
        return KnownMembership(fetched.value, fetched.began)

    async def load_joined(self, room_id: str, users: Collection[str], deadline: Deadline) -> None:
        """Learn with one request which of these users are joined. Of the others nothing is learnt: the list does not
        tell why they are missing. Never fails, and never waits beyond the deadline.
        """
        try:
            listed = await deadline.wait(self._lists.get(room_id, self._clock.seconds()))
        except (TimeoutError, DependencyFailed):
            return
        joined = frozenset(listed.value or ())
        for user in joined.intersection(users):
            self._remember(_Key(room_id, user), Membership.JOIN, listed.began)

    async def confirm(
        self, room_id: str, user: str, deadline: Deadline, since: float, *, local: bool
    ) -> KnownMembership:
        """The membership on which a refusal may rest: "not joined" is read twice, from ``since`` on.

        A user of another homeserver without any entry is looked up again until the deadline.
        """
        known = await self.get(room_id, user, deadline, since)
        read_twice = False
        while known.membership not in (None, Membership.JOIN):
            lagging = not local and known.membership is Membership.ABSENT
            pause = FEDERATION_LOOK if lagging else SECOND_LOOK
            if read_twice and (not lagging or deadline.left() < pause):
                return known
            if deadline.left() < pause:
                return KnownMembership(None, reason="timeout")
            await deferLater(self._clock, pause)
            again = await self.get(room_id, user, deadline, self._clock.seconds())
            if again.membership is None and read_twice:
                return known
            known, read_twice = again, True
        return known

    def is_fresh(self, room_id: str, user: str, known: KnownMembership, max_age: float) -> bool:
        """Whether a remembered membership may still be believed."""
        return known.began >= self._oldest(_Key(room_id, user), max_age)

    def _oldest(self, key: _Key, max_age: float) -> float:
        """When a lookup must have begun at the earliest."""
        return max(
            self._clock.seconds() - max_age,
            self._all_changed,
            self._changed.get((key.room_id, ""), 0.0),
            self._changed.get((key.room_id, key.user), 0.0),
        )

    def last_known(self, room_id: str, user: str) -> KnownMembership | None:
        """The membership as it was last heard, however long ago; ``None`` if it never was."""
        if self._pushed.is_joined(room_id, user):
            return KnownMembership(Membership.JOIN, self._clock.seconds())
        return self._known.get(_Key(room_id, user))

    def departures(self, room_id: str) -> int:
        """A number that grows when somebody is found not to be joined any more, or not to be joined at all."""
        return self._departures.get(room_id, 0)

    def forget_freshness(self, room_id: str, user: str = "") -> None:
        """A membership of the room has changed, of one user if named: an earlier lookup is not believed."""
        self._changed[room_id, user] = self._clock.seconds()

    def forget_all_freshness(self) -> None:
        """Any membership may have changed unseen."""
        self._all_changed = self._clock.seconds()

    async def _look_up(self, key: _Key) -> Membership:
        began = self._clock.seconds()
        membership = await self._source.membership(key.user, key.room_id)
        self._remember(key, membership, began)
        return membership

    def _remember(self, key: _Key, membership: Membership, began: float) -> None:
        known = self._known.get(key)
        if known is None or known.began <= began:
            self._known[key] = KnownMembership(membership, began)
            if membership is not Membership.JOIN and (known is None or known.membership is Membership.JOIN):
                self._departures[key.room_id] = self.departures(key.room_id) + 1
