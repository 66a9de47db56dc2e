# SPDX-License-Identifier: Apache-2.0
"""What can be counted: one place for every metric's name, labels and meaning.

Each service makes its own, with its own registry; who counts something is handed it.
"""

from __future__ import annotations

import platform

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from lotusguard import __version__

_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)


class Metrics:
    """The guard's metrics; every name begins with ``lotusguard_``."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(namespace="lotusguard", registry=registry)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"lotusguard_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str, *labels: str) -> Gauge:
            return Gauge(f"lotusguard_{name}", meaning, labels, registry=registry)

        def histogram(name: str, meaning: str, *labels: str) -> Histogram:
            return Histogram(f"lotusguard_{name}", meaning, labels, buckets=_STAGE_BUCKETS, registry=registry)

        self.joins = counter(
            "joins",
            "Token requests by verdict (allowed, refused, would_refuse, failed) and reason",
            "verdict",
            "reason",
        )
        self.join_seconds = histogram(
            "join_stage_seconds", "Where a join's time went (policy, roster, verify, seat, upstream, total)", "sandbox"
        )
        self.fail_open = counter(
            "fail_open", "What passed without being enforced, by check and reason", "check", "reason"
        )
        self.dependency_calls = counter(
            "dependency_calls",
            "Calls to dependencies by outcome (ok, refused, failed, circuit_open, queue_full)",
            "dependency",
            "outcome",
        )
        self.dependency_seconds = histogram("dependency_call_seconds", "Time of calls to dependencies", "dependency")
        self.clock_skew = gauge(
            "clock_skew_seconds", "Seconds by which a dependency's clock is ahead of ours", "dependency"
        )
        self.circuit_open = gauge("circuit_open", "1 while a dependency is not waited for", "dependency")
        self.in_flight = gauge("requests_in_flight", "Requests that are being answered")
        self.requests = counter("requests", "Requests at the public door by kind (token, relay)", "kind")
        self.webhooks = counter(
            "webhooks", "SFU webhooks by outcome (accepted, duplicate, forged, unverifiable)", "outcome"
        )
        self.revocations = counter("revocations", "Sources taken from participants", "source")
        self.restorations = counter("restorations", "Sources given back to participants", "source")
        self.mutes = counter("mutes", "Video tracks muted that called themselves a microphone")
        self.ejections = counter("ejections", "Participants put out of full rooms")
        self.dry_run_skipped = counter(
            "dry_run_skipped", "What GUARD_DRY_RUN or GUARD_OVERFLOW=allow left undone", "action"
        )
        self.enforcement_failures = counter(
            "enforcement_failures", "Enforcement that did not succeed", "action", "reason"
        )
        self.reconcile_seconds = histogram("reconcile_seconds", "Time of one reconciling round")
        self.rooms = gauge("rooms", "SFU rooms with people in them that have a policy")
        self.participants = gauge("participants", "Participants seen in rooms with a policy")
        self.seats_held = gauge("seats_held", "Seats held in rooms with a cap, claims included")
        self.cache_entries = gauge("cache_entries", "Entries of a cache", "cache")
        self.cache_limit = gauge("cache_limit", "Most entries that a cache may have", "cache")
        self.cache_lookups = counter("cache_lookups", "Look-ups in a cache (hit, stale, miss)", "cache", "result")
        self.state_writes = counter("state_writes", "Batches written to the state directory", "outcome")
        self.state_writes_pending = gauge("state_writes_pending", "Writes that are not in the state directory yet")
        self.state_bad_rows = gauge("state_bad_rows", "Rows of the state directory that could not be read")
        self.secret_mismatches = counter("secret_mismatches", "Issued tokens that our secret did not sign")
        self.malformed_policies = counter("malformed_policies", "Policy events whose value cannot be used", "event")
        self.reactor_lag = gauge("reactor_lag_seconds", "How late the reactor was at the last look")
        self.removals = counter("removals", "Participants removed, by reason", "reason")
        self.tokens_rebuilt = counter("tokens_rebuilt", "x")
        self.foreign_tokens = counter("foreign_tokens", "x")
        self.slots_rejected = counter("slots_rejected", "x")
        self.memberships_unknown = counter("memberships_unknown", "x")
        self.unidentified_participants = gauge("unidentified_participants", "x")
        self.enforcing = gauge("enforcing", "x", "rule")
        self.dry_run = gauge("dry_run", "x")
        self.build = gauge("build_info", "Versions", "version", "python")
        self.build.labels(__version__, platform.python_version()).set(1)

    def observe_stage(self, stage: str, seconds: float) -> None:
        self.join_seconds.labels(stage).observe(seconds)
