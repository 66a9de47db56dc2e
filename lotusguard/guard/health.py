# SPDX-License-Identifier: Apache-2.0
"""What is and is not enforced right now, and why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.lk_jwt_service import LkJwtService
from lotusguard.clients.synapse import OpenIDClient, SynapseClient
from lotusguard.clients.waiting import SharedLookups, gather
from lotusguard.guard.calls.changes import CallChanges
from lotusguard.guard.calls.failing import FailingCalls
from lotusguard.guard.joins.decisions import DecisionLog
from lotusguard.guard.lobby.switching import LobbySwitch
from lotusguard.guard.rooms.sources import RoomSources
from lotusguard.guard.seats.lease import StateLease
from lotusguard.guard.seats.roster import Roster
from lotusguard.guard.seats.store import StateStore
from lotusguard.metrics import Metrics

log = Logger()

WATCH_INTERVAL = 30.0
"""Seconds between reports that nobody asks for, while nothing is known to have changed."""
REMEMBERED = 600.0
"""Seconds for which a wrong secret or an internal error keeps the guard from calling itself ready."""
CLOCK_TOLERANCE = 30.0
"""Seconds by which our clock may differ from another service's."""
RULES = ("limit", "sources", "membership", "in_call")
MISSING = {
    "no_livekit_key": "LIVEKIT_KEY and LIVEKIT_SECRET are not set",
    "no_matrix_token": "MATRIX_TOKEN is not set",
    "no_admin_and_no_invites": (
        "MATRIX_TOKEN is not an admin's, and its account accepts no invitations (GUARD_INVITES): no room can be read"
    ),
}


@define(eq=False)
class Health:
    """Asks all dependencies, and looks at what happened lately.

    :param store: the state directory; ``None`` if there is none or it cannot be used, as ``store_error`` says.
    :param exposed: a warning about a listener that believes anybody; "" without one.
    :param redis_fault: tells why seats are not shared now, "" if they are; ``None`` if they should not be.
    """

    _livekit: LiveKitClient
    _homeserver: SynapseClient
    _openid: OpenIDClient
    _sources: RoomSources
    _upstream: LkJwtService
    _decision_log: DecisionLog
    _changes: CallChanges
    _roster: Roster
    _store: StateStore | None
    _lease: StateLease | None
    _store_error: str | None
    _lobbies: LobbySwitch
    _failing: FailingCalls
    _clock: IReactorTime
    _metrics: Metrics
    dry_run: bool
    _enforces_membership: bool
    _reconcile_interval: float
    _redis_fault: Callable[[], str] | None = None
    exposed: str = ""
    _reports: SharedLookups[str, dict[str, Any]] = field(init=False)
    _began: float = field(init=False)
    _enforced: dict[str, bool] = field(factory=dict, init=False)
    _watched: tuple[object, ...] = field(init=False)
    _watched_at: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._reports = SharedLookups(self._report)
        self._began = self._watched_at = self._clock.seconds()
        self._watched = self._seen()
        self._metrics.dry_run.set(1 if self.dry_run else 0)

    def report(self) -> Deferred[dict[str, Any]]:
        """The report, as JSON. However many ask at once, the dependencies are asked once."""
        return self._reports.get("")

    async def watch(self) -> None:
        """Keep the metrics and the log up to date with what is enforced.

        Called every second. The dependencies are asked when `WATCH_INTERVAL` is over, and at once when a call of
        somebody else has shown that something changed, such as a revoked access token.
        """
        now, seen = self._clock.seconds(), self._seen()
        if seen != self._watched or now - self._watched_at >= WATCH_INTERVAL:
            self._watched_at = now
            await self.report()
        self._watched = self._seen()

    def _seen(self) -> tuple[object, ...]:
        """What is known about enforcing without asking anybody."""
        return (
            self._livekit.refused, self._sources.refused, self._livekit.available, self._homeserver.available,
            *self._sources.report().values(),
            self._lately(self._decision_log.secret_mismatch_at), self._lately(self._decision_log.error_at),
            self._lease is None or self._lease.held, bool(self._failing.report()),
        )  # fmt: skip

    async def not_enforced(self) -> list[str]:
        """What is not enforced in rooms that the guard is in, and why: for their moderators."""
        report = await self.report()
        if all(report["enforcing"].values()):
            return []
        off = [rule for rule, on in report["enforcing"].items() if not on]
        return [f"{', '.join(off)} ({'; '.join(report['reasons']) or 'switched off'})"]

    async def _report(self, _: str) -> dict[str, Any]:
        now = self._clock.seconds()
        livekit, synapse, openid, upstream = await gather(
            _fault(asked.probe) for asked in (self._livekit, self._sources, self._openid, self._upstream)
        )
        mismatch = self._lately(self._decision_log.secret_mismatch_at)
        errors = self._lately(self._decision_log.error_at)
        round_at = self._changes.round_at
        late = now - (round_at if round_at is not None else self._began) > 3 * self._reconcile_interval + 2
        leased = self._lease is None or self._lease.held
        livekit, synapse = livekit or self._livekit.refused, synapse or self._sources.refused
        known = not livekit and not synapse and not self.dry_run
        shared = self._redis_fault is None or not self._redis_fault()
        enforcing = {
            "limit": known and shared,
            "sources": known and not mismatch,
            "membership": not synapse and not self.dry_run and self._enforces_membership,
            "in_call": known and not late and leased and not self._failing.report(),
        }
        faults = {"livekit": livekit, "synapse": synapse, "synapse_openid": openid, "upstream": upstream}
        reasons = [
            f"{name}: {MISSING.get(fault, fault)}"
            for name, fault in faults.items()
            if fault and not (name == "synapse_openid" and synapse)  # they are the same server
        ]
        reasons += self._reasons(mismatch=mismatch, errors=errors, late=late and not livekit, leased=leased)
        wanted = {rule: on for rule, on in enforcing.items() if rule != "membership" or self._enforces_membership}
        self._tell(wanted, reasons)
        return {
            "ready": all(wanted.values()) and not upstream and not errors,
            "enforcing": enforcing,
            "reasons": reasons,
            "dependencies": self._dependencies(faults),
            "rooms": self._sources.report(),
            "credentials": {
                "livekit": livekit != "no_livekit_key",
                "matrix": synapse not in ("no_matrix_token", "no_admin_and_no_invites") and not self._sources.refused,
            },
            "secret_mismatch_seen": mismatch,
            "internal_errors_seen": errors,
            "webhooks": {"last_seen_seconds_ago": self._ago(self._changes.webhook_at)},
            "state": {
                "kept": self._store is not None,
                "writable": self._store is not None and self._store.writable,
                "waiting_writes": self._store.pending if self._store is not None else 0,
                "error": self._store_error,
            },
            "dry_run": self.dry_run,
        }

    def _dependencies(self, faults: dict[str, str | None]) -> dict[str, Any]:
        available = {
            "livekit": self._livekit.available, "synapse": self._homeserver.available,
            "synapse_openid": self._openid.available, "upstream": True,
        }  # fmt: skip
        skew = {
            "livekit": self._livekit.clock_skew, "synapse": self._homeserver.clock_skew,
            "synapse_openid": self._openid.clock_skew,
        }  # fmt: skip
        return {
            name: {
                "error": fault,
                "circuit_open": not available[name],
                "clock_skew_seconds": round(known, 1) if (known := skew.get(name)) is not None else None,
            }
            for name, fault in faults.items()
        }

    def _reasons(self, *, mismatch: bool, errors: bool, late: bool, leased: bool) -> list[str]:
        reasons = []
        if self._sources.refused:
            reasons.append(f"the homeserver refuses MATRIX_TOKEN ({self._sources.refused})")
        reasons += self._sources.shortcomings()
        if mismatch:
            reasons.append("upstream issues tokens that LIVEKIT_KEY/LIVEKIT_SECRET did not sign")
        if errors:
            reasons.append("joins failed inside the guard in the last ten minutes; see the log")
        if late:
            reasons.append("reconciling does not finish")
        if fault := self._failing.report():
            reasons.append(fault)
        if self._redis_fault is not None and (fault := self._redis_fault()):
            reasons.append(f"seats are not shared with the other guards: {fault}")
        if not leased:
            reasons.append("another guard uses the same state directory: this one removes nobody")
        if self._store is not None and not self._store.writable:
            reasons.append(f"the state directory cannot be written; {self._store.pending} writes wait")
        if self._store_error:
            reasons.append(f"state directory: {self._store_error}")
        if self._lobbies.undecidable_rooms:
            reasons.append(
                f"the lobbies of {self._lobbies.undecidable_rooms} rooms are off: nobody could admit people there "
                "(invite the guard's account, or set GUARD_ADMIN_TOKEN)"
            )
        for name, skew in (("LiveKit", self._livekit.clock_skew), ("the homeserver", self._homeserver.clock_skew)):
            if skew is not None and abs(skew) > CLOCK_TOLERANCE:
                reasons.append(f"our clock and the clock of {name} differ by {abs(skew):.0f} s")
        if self._roster.unissued:
            reasons.append(
                f"{self._roster.unissued} participants have tokens that this guard did not issue: "
                "lk-jwt-service can be reached past it, or another guard runs"
            )
        if self.exposed:
            reasons.append(self.exposed)
        if self.dry_run:
            reasons.append("GUARD_DRY_RUN is on: nothing is changed")
        return reasons

    def _tell(self, enforcing: dict[str, bool], reasons: list[str]) -> None:
        """One gauge for each rule, and one log line at each change."""
        for rule, on in enforcing.items():
            self._metrics.enforcing.labels(rule).set(1 if on else 0)
        if enforcing == self._enforced:
            return
        self._enforced = enforcing
        off = [rule for rule, on in enforcing.items() if not on]
        if off:
            log.warn(
                "not enforced: {rules} ({reasons})", rules=", ".join(off), reasons="; ".join(reasons),
                enforcing=enforcing, event_name="enforcing",
            )  # fmt: skip
        else:
            log.info("everything is enforced", enforcing=enforcing, event_name="enforcing")

    def _lately(self, at: float | None) -> bool:
        return at is not None and self._clock.seconds() - at < REMEMBERED

    def _ago(self, at: float | None) -> float | None:
        return None if at is None else round(self._clock.seconds() - at, 1)


async def _fault(probe: Callable[[], Awaitable[object]]) -> str | None:
    """Why a dependency gives no usable answer, or ``None``."""
    try:
        await probe()
    except DependencyFailed as failed:
        return failed.reason
    return None
