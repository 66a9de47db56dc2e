# SPDX-License-Identifier: Apache-2.0
"""Rooms' policies: pushed by the homeserver, or asked of it and cached; remembered for when it does not answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum

from attrs import define, field, frozen
from cachetools import LRUCache
from prometheus_client import Counter
from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Deadline, FreshLookups, gather_in_turns
from lotusguard.guard.rooms.remembered import RememberedPolicies, RememberedPolicy
from lotusguard.guard.rooms.source import NOTHING_PUSHED, PushedRooms, RoomStateSource
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import is_room_id
from lotusguard.rules.policy import NO_POLICY, Policy, needs_levels
from lotusguard.rules.state import CREATE, POLICY_TYPES, POWER_LEVELS, StateEvent

FAILURE_REMEMBERED = 1.0
"""Seconds for which a failed lookup is not tried again for the same room."""
LOOKUPS_AT_ONCE = 8
"""Rooms that operators are shown and about which nothing is known: so many are looked up at the same time."""


class Freshness(Enum):
    """How well a policy is known."""

    FRESH = "fresh"
    STALE = "stale"
    """The last known one, while the homeserver does not answer."""
    UNKNOWN = "unknown"


@frozen
class KnownPolicy:
    """A room's policy as far as it is known.

    :ivar room_exists: whether the homeserver knows the room; ``None`` if it does not say.
    :ivar reason: why the policy is not fresh.
    """

    policy: Policy
    freshness: Freshness
    room_exists: bool | None
    reason: str = ""

    @property
    def is_certain(self) -> bool:
        return self.freshness is Freshness.FRESH


@define(eq=False)
class Policies:
    """What rooms' policies are.

    :param remembered: what was read, with the operator's default limit.
    :param ttl: seconds for which a policy is believed.
    :param stale: seconds for which the last known one serves while the homeserver does not answer.
    :param pushed: rooms whose state is pushed. While it is, it is believed without a TTL.
    """

    _source: RoomStateSource
    remembered: RememberedPolicies
    _clock: IReactorTime
    _metrics: Metrics
    ttl: float
    stale: float
    _pushed: PushedRooms = NOTHING_PUSHED
    _changed: LRUCache[str, float] = field(factory=lambda: LRUCache(20_000), init=False)
    _all_changed: float = field(default=0.0, init=False)
    _failed: LRUCache[str, tuple[float, str]] = field(factory=lambda: LRUCache(20_000), init=False)
    _lookups: FreshLookups[str, RememberedPolicy] = field(init=False)
    _hits: Counter = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._hits = self._metrics.cache_lookups.labels("policies", "hit")
        self._lookups = FreshLookups(self._look_up, self._clock)

    async def get_anew(self, room_id: str, deadline: Deadline, since: float) -> KnownPolicy:
        """The room's policy, as it is pushed now or looked up no earlier than ``since``. See `get`."""
        pushed = self._pushed.state_of(room_id)
        return await self.get(room_id, deadline, None if pushed is not None and pushed.live else since)

    async def get(self, room_id: str, deadline: Deadline, since: float | None = None) -> KnownPolicy:
        """The room's policy. Never fails, and never waits beyond the deadline.

        :param since: the lookup must have begun at this time or later, for decisions that an older one cannot carry.
        """
        known = self.in_memory(room_id, since)
        if known is not None:
            return known
        failed_at, reason = self._failed.get(room_id, (None, ""))
        if failed_at is not None and self._clock.seconds() - failed_at < FAILURE_REMEMBERED:
            return self._last_known(room_id, reason)
        try:
            fetched = await deadline.wait(self._lookups.get(room_id, self._oldest(room_id, since)))
        except TimeoutError:
            return self._last_known(room_id, "timeout")
        except DependencyFailed as failed:
            return self._last_known(room_id, failed.reason)
        self._metrics.cache_lookups.labels("policies", "miss").inc()
        return KnownPolicy(fetched.value.policy, Freshness.FRESH, fetched.value.room_exists)

    def in_memory(self, room_id: str, since: float | None = None) -> KnownPolicy | None:
        """The room's policy, if it is known without a lookup. See `get`."""
        if not is_room_id(room_id):
            return KnownPolicy(NO_POLICY, Freshness.FRESH, room_exists=False)
        pushed = self._pushed.state_of(room_id)
        if pushed is not None and pushed.live and since is None:
            self._hits.inc()
            return KnownPolicy(self.remembered.read_pushed(room_id, pushed).policy, Freshness.FRESH, room_exists=True)
        entry = self.remembered.get(room_id)
        if entry is not None and entry.began >= self._oldest(room_id, since):
            self._hits.inc()
            return KnownPolicy(entry.policy, Freshness.FRESH, entry.room_exists)
        return None

    def _oldest(self, room_id: str, since: float | None) -> float:
        """When a lookup must have begun at the earliest."""
        changed = max(self._changed.get(room_id, 0.0), self._all_changed)
        return max(self._clock.seconds() - self.ttl, changed, since or 0.0)

    def last_known(self, room_id: str) -> Policy:
        """The policy as it was last heard, however long ago; none if it never was."""
        pushed = self._pushed.state_of(room_id)
        if pushed is not None and pushed.live:
            return self.remembered.read_pushed(room_id, pushed).policy
        entry = self.remembered.get(room_id)
        return entry.policy if entry is not None else NO_POLICY

    async def look_up_unknown(self, room_ids: Iterable[str], deadline: Deadline) -> None:
        """Look up the rooms about which nothing is known, as far as that is done by the deadline."""

        async def look_up(room_id: str) -> None:
            if not deadline.passed:
                await self.get(room_id, deadline)

        await gather_in_turns(LOOKUPS_AT_ONCE, look_up, [one for one in room_ids if not self.is_remembered(one)])

    def is_remembered(self, room_id: str) -> bool:
        """Whether anything is known about the room."""
        return room_id in self.remembered

    def has_existed(self, room_id: str) -> bool:
        """Whether the homeserver knew the room when it was last read."""
        entry = self.remembered.get(room_id)
        return entry is not None and entry.room_exists

    def forget_freshness(self, room_id: str) -> None:
        """The policy has changed: an answer to an earlier lookup is not believed.

        The last known policy still serves while nothing newer can be had.
        """
        self._changed[room_id] = self._clock.seconds()
        self._failed.pop(room_id, None)

    def forget_all_freshness(self) -> None:
        """Any policy may have changed unseen."""
        self._all_changed = self._clock.seconds()

    def forget(self, room_id: str) -> None:
        """The room's state cannot be known any more: not even the last known policy holds."""
        self.forget_freshness(room_id)
        self.remembered.forget(room_id)

    def _last_known(self, room_id: str, reason: str) -> KnownPolicy:
        pushed, entry = self._pushed.state_of(room_id), self.remembered.get(room_id)
        if pushed is not None and (entry is None or entry.began < pushed.at):
            entry = self.remembered.read_pushed(room_id, pushed)
        if entry is not None and self._clock.seconds() - entry.began < self.stale:
            self._metrics.cache_lookups.labels("policies", "stale").inc()
            return KnownPolicy(entry.policy, Freshness.STALE, None, reason)
        return KnownPolicy(NO_POLICY, Freshness.UNKNOWN, None, reason)

    async def _look_up(self, room_id: str) -> RememberedPolicy:
        began = self._clock.seconds()
        before = self.remembered.get(room_id)
        try:
            events = await self._fetch(room_id, before)
        except DependencyFailed as failed:
            self._failed[room_id] = (self._clock.seconds(), failed.reason)
            raise
        return self.remembered.read(room_id, events, began)

    async def _fetch(self, room_id: str, before: RememberedPolicy | None) -> Mapping[str, StateEvent] | None:
        """:return: the policy's events; ``None`` if the homeserver does not know the room.

        :raises DependencyFailed: it does not answer, or has forgotten the room's state (its last user has left).
        """
        types = (*POLICY_TYPES, CREATE)
        expects_levels = before is not None and before.policy.levels is not None
        events = await self._source.room_state(room_id, (*types, POWER_LEVELS) if expects_levels else types)
        if events is None:
            return None
        if not events:
            raise DependencyFailed("synapse", "no_state")
        if needs_levels(events) and not expects_levels:
            levels = await self._source.room_state(room_id, (POWER_LEVELS,))
            events = {**events, **(levels or {})}
        return events
