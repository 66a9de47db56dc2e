# SPDX-License-Identifier: Apache-2.0
"""Rooms' policies: asked of the homeserver, believed for a while, remembered for when it is away. Floor: guard."""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

from attrs import evolve, frozen
from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.synapse import SynapseClient
from lotusguard.clients.waiting import Budget, SharedLookups
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import is_room_id
from lotusguard.rules.policy import NO_POLICY, ROOM_QUALITY, VOICE_LIMIT, Policy, forbidden_sources, max_users

log = Logger()

ROOMS_REMEMBERED = 20_000
FAILURE_REMEMBERED = 1.0
"""Seconds for which a failed look-up is not tried again for the same room."""


class Freshness(Enum):
    """How well a policy is known."""

    FRESH = "fresh"
    STALE = "stale"
    UNKNOWN = "unknown"


@frozen
class Known:
    """A room's policy as far as it is known. ``reason`` says why it is not fresh."""

    policy: Policy
    freshness: Freshness
    reason: str = ""


@frozen
class _Remembered:
    policy: Policy
    malformed: frozenset[str]
    at: float
    dropped: bool = False
    """it has changed since: it only serves while the homeserver does not answer"""


class Policies:
    """What rooms' policies are.

    :param ttl: seconds for which a policy is believed.
    :param stale: seconds for which a last-known one serves while the homeserver does not answer.
    """

    def __init__(
        self, homeserver: SynapseClient | None, clock: IReactorTime, metrics: Metrics, *, ttl: float, stale: float
    ) -> None:
        self._homeserver = homeserver
        self._clock = clock
        self._ttl = ttl
        self._stale = stale
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()
        self._failed: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._lookups = SharedLookups(self._look_up)
        self._metrics = metrics
        self._results = {r: metrics.cache_lookups.labels("policies", r) for r in ("hit", "stale", "miss")}
        metrics.cache_limit.labels("policies").set(ROOMS_REMEMBERED)
        metrics.cache_entries.labels("policies").set_function(lambda: len(self._remembered))

    async def get(self, room_id: str, budget: Budget) -> Known:
        """The room's policy: the believed one, else what one look-up for all who wait brings, else the
        last known, else none. Never fails, and never waits longer than the budget."""
        if not is_room_id(room_id):
            return Known(NO_POLICY, Freshness.FRESH)
        known = self.believed(room_id)
        if known is not None:
            self._results["hit"].inc()
            return Known(known, Freshness.FRESH)
        if self._homeserver is None:
            return self._last_known(room_id, "no_matrix_token")
        failed_at, reason = self._failed.get(room_id, (float("-inf"), ""))
        if self._clock.seconds() - failed_at < FAILURE_REMEMBERED:
            return self._last_known(room_id, reason)
        try:
            policy = await budget.wait(self._lookups.get(room_id))
        except TimeoutError:
            return self._last_known(room_id, "timeout")
        except DependencyFailed as failed:
            return self._last_known(room_id, failed.reason)
        self._results["miss"].inc()
        return Known(policy, Freshness.FRESH)

    def believed(self, room_id: str) -> Policy | None:
        """The policy that was looked up within the TTL, if one was."""
        known = self._remembered.get(room_id)
        fresh = known is not None and not known.dropped and self._clock.seconds() - known.at < self._ttl
        return known.policy if known is not None and fresh else None

    def last_known(self, room_id: str) -> Policy:
        """The policy as it was last heard, however long ago; none when it never was."""
        known = self._remembered.get(room_id)
        return known.policy if known is not None else NO_POLICY

    def drop(self, room_id: str) -> None:
        """The policy has changed: ask again, and do not believe an answer that is still under way.

        What was known stays at hand for the case that the homeserver does not answer now.
        """
        known = self._remembered.get(room_id)
        if known is not None:
            self._remembered[room_id] = evolve(known, dropped=True)
        elif room_id in self._lookups:  # its first one: what it brings must find that somebody was here
            self._remembered[room_id] = _Remembered(NO_POLICY, frozenset(), float("-inf"))
        self._failed.pop(room_id, None)
        self._lookups.forget(room_id)

    def _last_known(self, room_id: str, reason: str) -> Known:
        known = self._remembered.get(room_id)
        if known is not None and self._clock.seconds() - known.at < self._stale:
            self._results["stale"].inc()
            return Known(known.policy, Freshness.STALE, reason)
        return Known(NO_POLICY, Freshness.UNKNOWN, reason)

    async def _look_up(self, room_id: str) -> Policy:
        assert self._homeserver is not None
        began = self._clock.seconds()
        before = self._remembered.get(room_id)
        try:
            events = await self._homeserver.policy_events(room_id)
        except DependencyFailed as failed:
            self._failed[room_id] = (self._clock.seconds(), failed.reason)
            if len(self._failed) > ROOMS_REMEMBERED:
                self._failed.popitem(last=False)
            raise
        limit, bad_limit = max_users(events[VOICE_LIMIT]) if VOICE_LIMIT in events else (None, False)
        forbidden, bad_quality = (
            forbidden_sources(events[ROOM_QUALITY]) if ROOM_QUALITY in events else (frozenset(), False)
        )
        policy = Policy(limit, forbidden)
        malformed = frozenset(kind for kind, bad in ((VOICE_LIMIT, bad_limit), (ROOM_QUALITY, bad_quality)) if bad)
        for kind in malformed - (before.malformed if before else frozenset()):
            self._metrics.malformed_policies.labels(kind).inc()
            log.warn(
                "{room_id}: {event_type} holds what cannot be used; it limits nothing: {content}",
                room_id=room_id, event_type=kind, content=str(events[kind])[:200], event_name="malformed_policy",
            )  # fmt: skip
        if self._remembered.get(room_id) is before:  # else somebody knows better by now
            self._remembered[room_id] = _Remembered(policy, malformed, began)
            self._remembered.move_to_end(room_id)
            if len(self._remembered) > ROOMS_REMEMBERED:
                self._remembered.popitem(last=False)
        if policy != (before.policy if before else NO_POLICY):
            log.info(
                "{room_id}: at most {max_users} users, forbidden: {forbidden}",
                room_id=room_id, max_users=policy.max_users,
                forbidden=sorted(source.claim for source in policy.forbidden), event_name="policy",
            )  # fmt: skip
        return policy
