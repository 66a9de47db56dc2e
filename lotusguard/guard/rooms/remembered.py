# SPDX-License-Identifier: Apache-2.0
"""The policies that were read: kept in bounded memory, and what changed is logged."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, evolve, field, frozen
from cachetools import LRUCache
from twisted.logger import Logger

from lotusguard.guard.rooms.source import PushedState
from lotusguard.metrics import Metrics
from lotusguard.rules.policy import NO_POLICY, Malformed, Policy, read_policy, with_default_limit
from lotusguard.rules.state import StateEvent

log = Logger()

POLICIES_KEPT = 64 * 1024 * 1024
"""Bytes of rooms with a policy."""
ROOMS_WITHOUT_POLICY_KEPT = 8 * 1024 * 1024
"""Bytes of rooms without one. They are kept apart, so that a flood of made-up rooms forgets no policy."""
ENTRY_SIZE = 1024
"""Bytes that an entry costs beside its event contents."""
USUAL_TEXT, TEXT_COST = 500, 15
"""Characters of its events that an entry's size allows for, and the bytes that a policy takes for each further
one: measured with exceptions for 2,600 users in one event, and with 5,000 values that cannot be used."""
MALFORMED_LOGGED = 10
"""Keys of one change that are logged as unusable; the others are counted."""


@frozen
class RememberedPolicy:
    """A policy, and what it was read from.

    :ivar has_events: whether the room says anything itself, beside the operator's default limit.
    :ivar began: when the lookup began that returned it. :ivar size: bytes it is counted as.
    :ivar pushed: the pushed events from which it was read.
    :ivar default_limit: see `RememberedPolicies`.
    """

    policy: Policy
    has_events: bool
    room_exists: bool
    malformed: frozenset[Malformed]
    began: float
    size: int
    default_limit: int | None
    pushed: Mapping[str, StateEvent] | None = None


@define(eq=False)
class RememberedPolicies:
    """What each room's policy was when it was last read.

    :ivar default_limit: ``max_users`` of rooms that do not set it. A policy is read anew after it was changed.
    """

    _metrics: Metrics
    default_limit: int | None = None
    _with_policy: LRUCache[str, RememberedPolicy] = field(init=False)
    _without_policy: LRUCache[str, RememberedPolicy] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._with_policy = LRUCache(POLICIES_KEPT, getsizeof=_size)
        self._without_policy = LRUCache(ROOMS_WITHOUT_POLICY_KEPT, getsizeof=_size)
        for name, cache in (("policies", self._with_policy), ("rooms_without_policy", self._without_policy)):
            self._metrics.cache_limit.labels(name).set(cache.maxsize // ENTRY_SIZE)
            self._metrics.cache_entries.labels(name).set_function(cache.__len__)

    def __contains__(self, room_id: str) -> bool:
        return room_id in self._with_policy or room_id in self._without_policy

    def get(self, room_id: str) -> RememberedPolicy | None:
        return self._with_policy.get(room_id) or self._without_policy.get(room_id)

    def forget(self, room_id: str) -> None:
        self._with_policy.pop(room_id, None)
        self._without_policy.pop(room_id, None)

    def read(self, room_id: str, events: Mapping[str, StateEvent] | None, began: float) -> RememberedPolicy:
        """Read a policy from its events, and remember it unless a later lookup has answered.

        :param events: ``None`` if the homeserver does not know the room. :param began: when they were asked for.
        """
        before = self.get(room_id)
        entry = self._entry(events, began)
        if before is None or before.began <= began:
            _log_changes(self._metrics, room_id, entry, before)
            self._remember(room_id, entry)
        return entry

    def read_pushed(self, room_id: str, pushed: PushedState) -> RememberedPolicy:
        """The same for state that is pushed. Events that were read before are not read again."""
        before = self.get(room_id)
        if before is not None and before.pushed is pushed.events and before.default_limit == self.default_limit:
            entry = before if pushed.at - before.began < 1 else evolve(before, began=pushed.at)
        else:
            entry = evolve(self._entry(pushed.events, pushed.at), pushed=pushed.events)
            _log_changes(self._metrics, room_id, entry, before)
        if entry is not before:
            self._remember(room_id, entry)
        return entry

    def _entry(self, events: Mapping[str, StateEvent] | None, began: float) -> RememberedPolicy:
        own, malformed = read_policy(events or {})
        policy = with_default_limit(own, self.default_limit)
        text = sum(len(str(event.content)) for event in (events or {}).values())
        size = ENTRY_SIZE + text + TEXT_COST * max(0, text - USUAL_TEXT)
        return RememberedPolicy(policy, bool(own), events is not None, malformed, began, size, self.default_limit)

    def _remember(self, room_id: str, entry: RememberedPolicy) -> None:
        keep, other = self._with_policy, self._without_policy
        if not entry.has_events:
            keep, other = other, keep
        other.pop(room_id, None)
        if entry.size <= keep.maxsize:
            keep[room_id] = entry


def _size(entry: RememberedPolicy) -> int:
    return entry.size


def _log_changes(metrics: Metrics, room_id: str, entry: RememberedPolicy, before: RememberedPolicy | None) -> None:
    known = before.malformed if before is not None else frozenset()
    for number, wrong in enumerate(sorted(entry.malformed - known)):
        metrics.malformed_policies.labels(wrong.event_type).inc()
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
