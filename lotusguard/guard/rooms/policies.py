# SPDX-License-Identifier: Apache-2.0
"""Rooms' policies: pushed by the homeserver, or asked of it and cached; remembered for when it does not answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum

from attrs import define, evolve, field, frozen
from cachetools import LRUCache
from prometheus_client import Counter
from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Deadline, FreshLookups, gather_in_turns
from lotusguard.guard.rooms.source import NOTHING_PUSHED, PushedRooms, PushedState, RoomStateSource
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import is_room_id
from lotusguard.rules.policy import NO_POLICY, Malformed, Policy, needs_levels, read_policy, with_default_limit
from lotusguard.rules.state import CREATE, POLICY_TYPES, POWER_LEVELS, StateEvent

log = Logger()

POLICIES_KEPT = 64 * 1024 * 1024
"""Bytes of rooms with a policy."""
ROOMS_WITHOUT_POLICY_KEPT = 8 * 1024 * 1024
"""Bytes of rooms without one. They are kept apart, so that a flood of made-up rooms forgets no policy."""
FAILURE_REMEMBERED = 1.0
"""Seconds for which a failed lookup is not tried again for the same room."""
LOOKUPS_AT_ONCE = 8
"""Rooms that operators are shown and about which nothing is known: so many are looked up at the same time."""
ENTRY_SIZE = 1024
"""Bytes that an entry costs beside its event contents."""
USUAL_TEXT, TEXT_COST = 500, 15
"""Characters of its events that an entry's size allows for, and the bytes that a policy takes for each further
one: measured with exceptions for 2,600 users in one event, and with 5,000 values that cannot be used."""
MALFORMED_LOGGED = 10
"""Keys of one change that are logged as unusable; the others are counted."""


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


@frozen
class _Entry:
    """
    :ivar began: when the lookup began that returned it.
    :ivar has_events: whether the room says anything itself, beside the operator's default limit.
    :ivar pushed: the pushed events from which it was read.
    """

    policy: Policy
    has_events: bool
    room_exists: bool
    malformed: frozenset[Malformed]
    began: float
    size: int
    pushed: Mapping[str, StateEvent] | None = None


@define(eq=False)
class Policies:
    """What rooms' policies are.

    :param ttl: seconds for which a policy is believed.
    :param stale: seconds for which the last known one serves while the homeserver does not answer.
    :param default_limit: ``max_users`` of rooms that do not set it.
    :param pushed: rooms whose state is pushed. While it is, it is believed without a TTL.
    """

    _source: RoomStateSource
    _clock: IReactorTime
    _metrics: Metrics
    ttl: float
    stale: float
    default_limit: int | None = None
    _pushed: PushedRooms = NOTHING_PUSHED
    _with_policy: LRUCache[str, _Entry] = field(init=False)
    _without_policy: LRUCache[str, _Entry] = field(init=False)
    _changed: LRUCache[str, float] = field(factory=lambda: LRUCache(20_000), init=False)
    _all_changed: float = field(default=0.0, init=False)
    _failed: LRUCache[str, tuple[float, str]] = field(factory=lambda: LRUCache(20_000), init=False)
    _lookups: FreshLookups[str, _Entry] = field(init=False)
    _hits: Counter = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._hits = self._metrics.cache_lookups.labels("policies", "hit")
        self._with_policy = LRUCache(POLICIES_KEPT, getsizeof=_size)
        self._without_policy = LRUCache(ROOMS_WITHOUT_POLICY_KEPT, getsizeof=_size)
        self._lookups = FreshLookups(self._look_up, self._clock)
        for name, cache in (("policies", self._with_policy), ("rooms_without_policy", self._without_policy)):
            self._metrics.cache_limit.labels(name).set(cache.maxsize // ENTRY_SIZE)
            self._metrics.cache_entries.labels(name).set_function(cache.__len__)

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
            return KnownPolicy(self._read_pushed(room_id, pushed).policy, Freshness.FRESH, room_exists=True)
        entry = self._entry(room_id)
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
            return self._read_pushed(room_id, pushed).policy
        entry = self._entry(room_id)
        return entry.policy if entry is not None else NO_POLICY

    async def look_up_unknown(self, room_ids: Iterable[str], deadline: Deadline) -> None:
        """Look up the rooms about which nothing is known, as far as that is done by the deadline."""

        async def look_up(room_id: str) -> None:
            if not deadline.passed:
                await self.get(room_id, deadline)

        await gather_in_turns(LOOKUPS_AT_ONCE, look_up, [one for one in room_ids if not self.is_remembered(one)])

    def is_remembered(self, room_id: str) -> bool:
        """Whether anything is known about the room."""
        return room_id in self._with_policy or room_id in self._without_policy

    def has_existed(self, room_id: str) -> bool:
        """Whether the homeserver knew the room when it was last read."""
        entry = self._entry(room_id)
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
        self._with_policy.pop(room_id, None)
        self._without_policy.pop(room_id, None)

    def _entry(self, room_id: str) -> _Entry | None:
        return self._with_policy.get(room_id) or self._without_policy.get(room_id)

    def _last_known(self, room_id: str, reason: str) -> KnownPolicy:
        pushed, entry = self._pushed.state_of(room_id), self._entry(room_id)
        if pushed is not None and (entry is None or entry.began < pushed.at):
            entry = self._read_pushed(room_id, pushed)
        if entry is not None and self._clock.seconds() - entry.began < self.stale:
            self._metrics.cache_lookups.labels("policies", "stale").inc()
            return KnownPolicy(entry.policy, Freshness.STALE, None, reason)
        return KnownPolicy(NO_POLICY, Freshness.UNKNOWN, None, reason)

    async def _look_up(self, room_id: str) -> _Entry:
        began = self._clock.seconds()
        before = self._entry(room_id)
        try:
            events = await self._fetch(room_id, before)
        except DependencyFailed as failed:
            self._failed[room_id] = (self._clock.seconds(), failed.reason)
            raise
        entry = self._read(events, began)
        self._tell(room_id, entry, before)
        current = self._entry(room_id)
        if current is None or current.began <= began:
            self._remember(room_id, entry)
        return entry

    def _read(self, events: Mapping[str, StateEvent] | None, began: float) -> _Entry:
        own, malformed = read_policy(events or {})
        policy = with_default_limit(own, self.default_limit)
        text = sum(len(str(event.content)) for event in (events or {}).values())
        size = ENTRY_SIZE + text + TEXT_COST * max(0, text - USUAL_TEXT)
        return _Entry(policy, bool(own), events is not None, malformed, began, size)

    def _read_pushed(self, room_id: str, pushed: PushedState) -> _Entry:
        before = self._entry(room_id)
        if before is not None and before.pushed is pushed.events:
            entry = before if pushed.at - before.began < 1 else evolve(before, began=pushed.at)
        else:
            entry = evolve(self._read(pushed.events, pushed.at), pushed=pushed.events)
            self._tell(room_id, entry, before)
        if entry is not before:
            self._remember(room_id, entry)
        return entry

    async def _fetch(self, room_id: str, before: _Entry | None) -> Mapping[str, StateEvent] | None:
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

    def _remember(self, room_id: str, entry: _Entry) -> None:
        keep, other = self._with_policy, self._without_policy
        if not entry.has_events:
            keep, other = other, keep
        other.pop(room_id, None)
        if entry.size <= keep.maxsize:
            keep[room_id] = entry

    def _tell(self, room_id: str, entry: _Entry, before: _Entry | None) -> None:
        """Log what changed."""
        known = before.malformed if before is not None else frozenset()
        for number, wrong in enumerate(sorted(entry.malformed - known)):
            self._metrics.malformed_policies.labels(wrong.event_type).inc()
            if number < MALFORMED_LOGGED:
                log.warn(
                    "{room_id}: {event_type}: {key} cannot be used and is ignored ({count} keys in all)",
                    room_id=room_id, event_type=wrong.event_type, key=wrong.key or "its content",
                    count=len(entry.malformed), event_name="malformed_policy",
                )  # fmt: skip
        policy = entry.policy
        if policy != (before.policy if before is not None else NO_POLICY):
            log.info(
                "{room_id}: at most {max_users} users, forbidden: {forbidden}, permissions: {permissions}",
                room_id=room_id, max_users=policy.max_users,
                forbidden=sorted(source.claim for source in policy.forbidden),
                permissions=sorted(action.value for action in policy.permissions.needed) if policy.permissions else [],
                event_name="policy",
            )  # fmt: skip


def _size(entry: _Entry) -> int:
    return entry.size
