# SPDX-License-Identifier: Apache-2.0
"""All metrics, with their labels and their meaning. Each guard has a registry of its own."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from lotusguard import __version__
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.sources import Source
from lotusguard.rules.state import POLICY_TYPES
from lotusguard.times import BOUNDS, LabelledTimes

LOBBY_DECISIONS = ("admitted", "denied", "removed", "timed_out", "switched_off", "needs_no_decision", "left")
_REFUSALS = [refusal.value for refusal in Refusal]
_CHECKS = ("policy", "membership", "homeserver", "join_level", "start", "limit")
_UNKNOWN_BECAUSE = (
    "timeout", "unreachable", "circuit_open", "queue_full", "truncated", "invalid_response", "internal_error",
    "status_401", "status_403", "status_500", "status_502", "status_503", "no_livekit_key", "no_matrix_token",
)  # fmt: skip
"""Why a check could not be made, as far as it is known beforehand."""
_SOURCES = [source.claim for source in Source]


class Metrics:
    """The guard's metrics. Every name begins with ``lotusguard_``.

    A counter with labels begins with zeros for the values that are known beforehand: Prometheus sees the increase
    from 0 to 1 only if it has seen the 0.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="lotusguard", registry=self.registry)
        self._count_joins()
        self._count_dependencies()
        self._count_calls()
        self._count_internals()

    def _count_joins(self) -> None:
        self.joins = self._counter(
            "joins", "Token requests by verdict (allowed, refused, would_refuse, failed, error) and reason",
            "verdict", "reason",
            known=[*product(("refused", "would_refuse"), _REFUSALS), ("error", "internal_error"),
                   *product(("failed",), ("upstream_timeout", "upstream_unreachable", "caller_disconnected"))],
        )  # fmt: skip
        self.join_seconds = self._times("join_stage_seconds", "Time of a join by stage", "stage")
        self.fail_open = self._counter(
            "fail_open", "Checks that a join passed without being enforced", "check", "reason",
            known=[*product(_CHECKS, _UNKNOWN_BECAUSE), ("token", "secret_mismatch"), ("token", "internal_error")],
        )  # fmt: skip
        self.lobby_waiting = self._gauge("lobby_waiting", "People who wait in lobbies")
        self.lobby_decisions = self._counter(
            "lobby_decisions", "How waiting in a lobby ended, and removals by moderators", "decision",
            known=[(decision,) for decision in LOBBY_DECISIONS],
        )  # fmt: skip
        self.slots_rejected = self._counter("slots_rejected", "Token requests for more slots than a room may have")
        self.tokens_rebuilt = self._counter("tokens_rebuilt", "Tokens that were signed anew")
        self.foreign_tokens = self._counter("foreign_tokens", "Tokens of other issuers, passed on unchanged")
        self.secret_mismatches = self._counter("secret_mismatches", "Issued tokens that our secret did not sign")
        self.requests = self._counter(
            "requests", "Requests at the public listener", "kind", known=[("token",), ("relay",)]
        )
        self.in_flight = self._gauge("requests_in_flight", "Requests that are being answered")
        self.bodies_rejected = self._counter(
            "bodies_rejected", "Requests whose body was too large, or found no room", "reason",
            known=[("too_large",), ("no_room",)],
        )  # fmt: skip

    def _count_dependencies(self) -> None:
        outcomes = ("ok", "refused", "failed", "circuit_open", "queue_full")
        self.dependency_calls = self._counter(
            "dependency_calls", "Calls to dependencies", "dependency", "outcome",
            known=product(("livekit", "synapse", "upstream"), outcomes),
        )  # fmt: skip
        self.dependency_seconds = self._times("dependency_call_seconds", "Time of calls to dependencies", "dependency")
        self.circuit_open = self._gauge("circuit_open", "1 while a dependency is not asked", "dependency")
        self.credentials_refused = self._gauge(
            "credentials_refused", "1 while a dependency refuses our credentials", "dependency"
        )
        self.clock_skew = self._gauge(
            "clock_skew_seconds", "Seconds by which a dependency's clock is ahead of ours", "dependency"
        )
        self.webhooks = self._counter(
            "webhooks", "LiveKit's webhooks by outcome", "outcome",
            known=[("accepted",), ("duplicate",), ("forged",), ("unverifiable",)],
        )  # fmt: skip
        self.malformed_policies = self._counter(
            "malformed_policies", "State events whose value cannot be used", "event",
            known=[(event,) for event in POLICY_TYPES],
        )  # fmt: skip
        self.resident_rooms = self._gauge("resident_rooms", "Rooms that the guard's account is in")
        self.sync_alive = self._gauge("sync_alive", "1 while changes in those rooms reach the guard at once")
        self.invites = self._counter(
            "invites", "Invitations of the guard's account by outcome", "outcome",
            known=[("accepted",), ("declined",), ("failed",), ("dropped",)],
        )  # fmt: skip
        self.residence_overflow = self._counter(
            "residence_overflow", "Rooms, states or member lists that found no room in memory", "what",
            known=[("room",), ("state",), ("members",)],
        )  # fmt: skip
        self.notices = self._counter(
            "notices", "Events that the guard sent into rooms", "outcome",
            known=[("sent",), ("failed",), ("rate_limited",)],
        )  # fmt: skip
        self.commands = self._counter(
            "commands", "!call commands by outcome", "outcome",
            known=[("done",), ("refused",), ("failed",), ("dropped",)],
        )  # fmt: skip
        self.memberships_unknown = self._counter(
            "memberships_unknown", "Membership checks that no answer of the homeserver decided"
        )

    def _count_calls(self) -> None:
        self.enforcing = self._gauge("enforcing", "1 while a rule is enforced", "rule")
        self.dry_run = self._gauge("dry_run", "1 if GUARD_DRY_RUN is on")
        self.rooms = self._gauge("rooms", "SFU rooms with participants that have a policy")
        self.participants = self._gauge("participants", "Participants in those rooms")
        self.unidentified_participants = self._gauge(
            "unidentified_participants", "Participants whose Matrix user is not known"
        )
        self.unissued_participants = self._gauge(
            "unissued_participants", "Participants whose token this guard did not issue"
        )
        self.seats_held = self._gauge("seats_held", "Seats that are held in rooms with a limit")
        sources = [(source,) for source in _SOURCES]
        self.revocations = self._counter("revocations", "Sources revoked in calls", "source", known=sources)
        self.restorations = self._counter("restorations", "Sources restored in calls", "source", known=sources)
        self.mutes = self._counter("mutes", "Video tracks muted because they are labelled as audio")
        self.removals = self._counter(
            "members_removed", "Participants removed from calls", "reason",
            known=[(reason,) for reason in ("full", "not_a_member", "homeserver_not_allowed", "join_level", "removed")],
        )  # fmt: skip
        self.dry_run_skipped = self._counter(
            "dry_run_skipped", "Actions that GUARD_DRY_RUN or GUARD_OVERFLOW=allow prevented", "action"
        )
        self.enforcement_failures = self._counter(
            "enforcement_failures", "Enforcement in calls that did not succeed", "action", "reason"
        )
        self.reconcile_seconds = Histogram(
            "lotusguard_reconcile_seconds", "Time of one reconciling round", buckets=BOUNDS, registry=self.registry
        )

    def _count_internals(self) -> None:
        self.cache_entries = self._gauge("cache_entries", "Entries of a cache", "cache")
        self.cache_limit = self._gauge("cache_limit", "Most entries that a cache may have", "cache")
        self.cache_lookups = self._counter(
            "cache_lookups", "Lookups in a cache", "cache", "result",
            known=product(("policies",), ("hit", "stale", "miss")),
        )  # fmt: skip
        self.state_writes = self._counter(
            "state_writes",
            "Batches written to the state directory (ok, failed), and single writes given up (dropped, invalid)",
            "outcome", known=[("ok",), ("failed",), ("dropped",), ("invalid",)],
        )  # fmt: skip
        self.state_writes_pending = self._gauge(
            "state_writes_pending", "Writes that are not in the state directory yet"
        )
        self.state_bad_rows = self._gauge("state_bad_rows", "Rows of the state directory that could not be read")
        self.reactor_lag = self._gauge("reactor_lag_seconds", "How late the reactor's last measured timer was")
        self.build = self._gauge("build_info", "Versions", "version", "python")
        self.build.labels(__version__, platform.python_version()).set(1)

    def _counter(self, name: str, meaning: str, *labels: str, known: Iterable[tuple[str, ...]] = ()) -> Counter:
        counter = Counter(f"lotusguard_{name}", meaning, labels, registry=self.registry)
        for values in known:
            counter.labels(*values)
        return counter

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"lotusguard_{name}", meaning, labels, registry=self.registry)

    def _times(self, name: str, meaning: str, label: str) -> LabelledTimes:
        times = LabelledTimes(f"lotusguard_{name}", meaning, label)
        self.registry.register(times)
        return times
