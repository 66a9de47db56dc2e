# SPDX-License-Identifier: Apache-2.0
"""What is and is not being enforced right now, and why. Floor: guard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from attrs import asdict, define
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.lk_jwt_service import LkJwtService
from lotusguard.clients.synapse import SynapseClient
from lotusguard.clients.waiting import SharedLookups, gather
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.joins.decisions import DecisionLog
from lotusguard.guard.seats.store import Store

MISMATCH_REMEMBERED = 600.0
"""Seconds for which a token that our secret did not sign keeps us from saying that sources are enforced."""


@define
class DependencyHealth:
    """:ivar error: why it gave no usable answer just now, or ``None``."""

    error: str | None
    waited_for: bool


class Health:
    """Asks all dependencies and looks at what happened lately.

    :param store: the state directory; ``None`` when there is none or it could not be used, as ``store_error`` says.
    """

    def __init__(
        self,
        *,
        sfu: LiveKitClient | None,
        homeserver: SynapseClient | None,
        authorizer: LkJwtService,
        decision_log: DecisionLog,
        enforcement: Enforcement,
        store: Store | None,
        store_error: str | None,
        clock: IReactorTime,
        dry_run: bool,
        reconcile_interval: float,
    ) -> None:
        self._sfu = sfu
        self._homeserver = homeserver
        self._authorizer = authorizer
        self._decision_log = decision_log
        self._enforcement = enforcement
        self._store = store
        self._store_error = store_error
        self._clock = clock
        self._dry_run = dry_run
        self._round_age = 3 * reconcile_interval + 2
        self._reports: SharedLookups[str, dict[str, Any]] = SharedLookups(self._asked)
        self._began = clock.seconds()

    def report(self) -> Deferred[dict[str, Any]]:
        """The report, as JSON. However many ask at once, the dependencies are asked once."""
        return self._reports.get("")

    async def _asked(self, _: str) -> dict[str, Any]:
        now = self._clock.seconds()
        sfu, homeserver = self._sfu, self._homeserver
        livekit, synapse, upstream = await gather(
            (
                _tried(sfu.probe if sfu else None, "LIVEKIT_KEY and LIVEKIT_SECRET are not set"),
                _tried(homeserver.probe if homeserver else None, "MATRIX_TOKEN is not set"),
                _tried(self._authorizer.probe, ""),
            )
        )
        webhook_at, round_at = self._enforcement.webhook_at, self._enforcement.round_at
        mismatch_at = self._decision_log.secret_mismatch_at
        mismatch = mismatch_at is not None and now - mismatch_at < MISMATCH_REMEMBERED
        reasons = []
        if livekit:
            reasons.append(f"livekit: {livekit}")
        if synapse:
            reasons.append(f"synapse: {synapse}")
        if upstream:
            reasons.append(f"upstream: {upstream}")
        if mismatch:
            reasons.append("upstream issues tokens that LIVEKIT_KEY/LIVEKIT_SECRET did not sign")
        late = now - (round_at if round_at is not None else self._began) > self._round_age
        if late and sfu is not None:
            reasons.append("reconciling does not get through")
        if self._dry_run:
            reasons.append("GUARD_DRY_RUN is on: nothing is changed")
        told = not livekit and not synapse and not self._dry_run
        enforcing = {"cap": told, "sources": told and not mismatch, "in_call": told and not late}
        return {
            "ready": all(enforcing.values()) and not upstream,
            "enforcing": enforcing,
            "reasons": reasons,
            "dependencies": {
                "livekit": asdict(DependencyHealth(livekit, sfu is not None and sfu.well)),
                "synapse": asdict(DependencyHealth(synapse, homeserver is not None and homeserver.well)),
                "upstream": asdict(DependencyHealth(upstream, True)),
            },
            "credentials": {"livekit": sfu is not None, "matrix": homeserver is not None},
            "secret_mismatch_seen": mismatch,
            "webhooks": {"last_seen_seconds_ago": None if webhook_at is None else round(now - webhook_at, 1)},
            "state": {
                "kept": self._store is not None,
                "writable": self._store is not None and self._store.writable,
                "error": self._store_error,
            },
            "dry_run": self._dry_run,
        }


async def _tried(ask: Callable[[], Awaitable[object]] | None, missing: str) -> str | None:
    """Why a dependency gives no usable answer, or ``None``."""
    if ask is None:
        return missing
    try:
        await ask()
    except DependencyFailed as failed:
        return failed.reason
    return None
