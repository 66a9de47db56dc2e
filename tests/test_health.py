# SPDX-License-Identifier: Apache-2.0
"""The guard's report about itself: `/readyz`, gauges, and one log line for each change of what is enforced."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.guard.calls import failing
from lotusguard.guard.calls.entitlement import Entitlement
from lotusguard.guard.calls.failing import FailingCalls
from lotusguard.guard.health import WATCH_INTERVAL, Health
from lotusguard.metrics import Metrics
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, counted, logged, named, old_token, room_of
from tests.conftest import StartSandbox, until

RULES = ("limit", "sources", "membership", "in_call")


class Service:
    """A dependency that answers, refuses us, or fails."""

    def __init__(self) -> None:
        self.refused: str | None = None
        self.available = True
        self.clock_skew: float | None = None
        self.fault = ""
        self.probes = 0

    async def probe(self) -> None:
        self.probes += 1
        if self.fault:
            raise DependencyFailed("it", self.fault)


class Sources:
    """The source of room state: the homeserver's admin API."""

    def __init__(self, homeserver: Service) -> None:
        self._homeserver = homeserver

    @property
    def refused(self) -> str | None:
        return self._homeserver.refused

    async def probe(self) -> None:
        await self._homeserver.probe()

    def report(self) -> dict[str, Any]:
        return {"admin_api": True}

    def shortcomings(self) -> list[str]:
        return []


class Guard:
    """Health with stand-ins for the parts that it reads, on a clock."""

    def __init__(self, *, dry_run: bool = False, enforces_membership: bool = True, leased: bool = True) -> None:
        self.clock, self.metrics = Clock(), Metrics()
        self.livekit, self.homeserver, self.openid, self.upstream = Service(), Service(), Service(), Service()
        self.decisions = SimpleNamespace(secret_mismatch_at=None, error_at=None)
        self.changes = SimpleNamespace(round_at=None, webhook_at=None)
        self.roster = SimpleNamespace(unissued=0)
        self.lease = SimpleNamespace(held=leased)
        self.failing = FailingCalls(self.clock, remembered=69.0)
        self.sources = Sources(self.homeserver)
        self.switch = SimpleNamespace(undecidable_rooms=0)
        parts: tuple[Any, ...] = (
            self.livekit, self.homeserver, self.openid, self.sources, self.upstream, self.decisions, self.changes,
            self.roster,
        )  # fmt: skip
        livekit, homeserver, openid, sources, upstream, decisions, changes, roster = parts
        lease: Any = self.lease
        switch: Any = self.switch
        self.health = Health(
            livekit, homeserver, openid, sources, upstream, decisions, changes, roster, None, lease, None, switch,
            self.failing, self.clock, self.metrics, dry_run, enforces_membership=enforces_membership,
            reconcile_interval=3,
        )  # fmt: skip

    def report(self) -> dict[str, Any]:
        return self.health.report().result  # type: ignore[return-value]

    def watch(self, seconds: int) -> None:
        """Watch once a second, as the service does."""
        for _ in range(seconds):
            self.changes.round_at = self.clock.seconds()
            assert Deferred.fromCoroutine(self.health.watch()).called
            self.clock.advance(1)

    def enforce(self, alias: str = "alias", *, fails: bool) -> None:
        """One attempt to enforce an SFU room."""
        with self.failing.attempt(alias):
            if fails:
                self.failing.failed(alias, "remove", "status_500")

    def gauges(self) -> dict[str, float | None]:
        value = self.metrics.registry.get_sample_value
        return {rule: value("lotusguard_enforcing", {"rule": rule}) for rule in RULES}


# -- the report ------------------------------------------------------------------------------------------


def test_everything_is_enforced_while_all_dependencies_answer() -> None:
    report = Guard().report()
    assert report["ready"]
    assert report["enforcing"] == dict.fromkeys(RULES, True)
    assert report["reasons"] == []


@pytest.mark.parametrize(
    ("service", "off"),
    [("livekit", {"limit", "sources", "in_call"}), ("homeserver", set(RULES)), ("upstream", set())],
)
@pytest.mark.parametrize("fault", ["timeout", "no_livekit_key", "no_matrix_token"])
def test_failing_dependency_is_reported_with_the_rules_it_disables(service: str, off: set[str], fault: str) -> None:
    guard = Guard()
    getattr(guard, service).fault = fault
    report = guard.report()
    assert not report["ready"]
    assert {rule for rule, on in report["enforcing"].items() if not on} == off
    assert len(report["reasons"]) == 1


def test_a_homeserver_that_verifies_no_openid_tokens_is_named_and_every_rule_is_still_enforced() -> None:
    guard = Guard()
    guard.openid.fault = "status_404"
    report = guard.report()
    assert report["ready"]
    assert report["reasons"] == ["synapse_openid: status_404"]
    assert report["dependencies"]["synapse_openid"]["error"] == "status_404"


def test_a_homeserver_that_does_not_answer_at_all_is_named_once() -> None:
    guard = Guard()
    guard.homeserver.fault = guard.openid.fault = "unreachable"
    assert guard.report()["reasons"] == ["synapse: unreachable"]


def test_refused_credentials_count_even_if_the_probe_passes() -> None:
    guard = Guard()
    guard.homeserver.refused = "status_403"
    report = guard.report()
    assert not report["ready"]
    assert not report["enforcing"]["membership"]
    assert "the homeserver refuses MATRIX_TOKEN (status_403)" in report["reasons"]
    assert report["credentials"] == {"livekit": True, "matrix": False}


def test_disabled_membership_check_does_not_prevent_readiness() -> None:
    report = Guard(enforces_membership=False).report()
    assert report["ready"]
    assert not report["enforcing"]["membership"]


def test_nothing_is_enforced_in_a_dry_run() -> None:
    guard = Guard(dry_run=True)
    report = guard.report()
    assert not any(report["enforcing"].values())
    assert "GUARD_DRY_RUN is on: nothing is changed" in report["reasons"]
    assert guard.metrics.registry.get_sample_value("lotusguard_dry_run") == 1


def test_a_guard_without_the_lease_enforces_nothing_in_calls() -> None:
    report = Guard(leased=False).report()
    assert report["enforcing"] == {"limit": True, "sources": True, "membership": True, "in_call": False}


def test_reconciling_that_does_not_finish_is_reported() -> None:
    guard = Guard()
    guard.changes.round_at = 0.0
    guard.clock.advance(60)
    report = guard.report()
    assert "reconciling does not finish" in report["reasons"]
    assert not report["enforcing"]["in_call"]


def test_what_fails_in_a_call_and_fails_again_in_the_next_round_is_not_enforced_and_named() -> None:
    guard = Guard()
    for _ in range(2):
        guard.enforce(fails=True)
        guard.clock.advance(3)
    report = guard.report()
    assert not report["ready"]
    assert report["enforcing"] == {"limit": True, "sources": True, "membership": True, "in_call": False}
    assert report["reasons"] == ["enforcement keeps failing in one call (remove: status_500)"]


def test_a_failure_that_the_next_round_repairs_is_not_reported_and_no_reason_for_the_next_one() -> None:
    guard = Guard()
    for _ in range(5):
        guard.enforce(fails=True)
        guard.enforce(fails=True)  # at once, because somebody arrives
        assert guard.report()["ready"]
        guard.clock.advance(3)
        guard.enforce(fails=False)
        guard.changes.round_at = guard.clock.seconds()


def test_a_call_in_which_nothing_fails_any_more_does_not_hide_one_in_which_enforcement_still_fails() -> None:
    guard = Guard()
    for _ in range(2):
        guard.enforce("one", fails=True)
        guard.enforce("other", fails=True)
        guard.clock.advance(3)
    guard.enforce("one", fails=False)
    assert guard.report()["reasons"] == ["enforcement keeps failing in one call (remove: status_500)"]
    guard.enforce("other", fails=False)
    assert guard.report()["ready"]


def test_an_internal_error_in_every_attempt_is_reported() -> None:
    guard = Guard()
    for _ in range(2):
        with pytest.raises(KeyError), guard.failing.attempt("alias"):
            raise KeyError
        guard.clock.advance(3)
    assert guard.report()["reasons"] == ["enforcement keeps failing in one call (enforce: internal_error)"]


def test_failures_in_a_call_that_is_over_are_forgotten_although_nobody_tries_again() -> None:
    guard = Guard()
    for _ in range(2):
        guard.enforce(fails=True)
        guard.clock.advance(3)
    guard.clock.advance(70)
    guard.changes.round_at = guard.clock.seconds()
    assert guard.report()["ready"]


@pytest.mark.parametrize(
    ("what", "rule"), [("secret_mismatch_at", "sources"), ("error_at", None)], ids=["secret_mismatch", "error"]
)
def test_recent_errors_are_reported_for_ten_minutes(what: str, rule: str | None) -> None:
    guard = Guard()
    setattr(guard.decisions, what, guard.clock.seconds())
    report = guard.report()
    assert not report["ready"]
    assert {name for name, on in report["enforcing"].items() if not on} == ({rule} if rule else set())
    guard.clock.advance(601)
    guard.changes.round_at = guard.clock.seconds()
    assert guard.report()["ready"]


def test_clock_skew_is_reported() -> None:
    guard = Guard()
    guard.livekit.clock_skew = -45.2
    report = guard.report()
    assert report["reasons"] == ["our clock and the clock of LiveKit differ by 45 s"]
    assert report["dependencies"]["livekit"]["clock_skew_seconds"] == -45.2


def test_participants_whose_tokens_came_from_elsewhere_are_reported() -> None:
    guard = Guard()
    guard.roster.unissued = 2
    report = guard.report()
    assert report["ready"]
    assert "2 participants have tokens that this guard did not issue" in report["reasons"][0]


# -- watching ----------------------------------------------------------------------------------------------


def test_dependencies_are_probed_at_every_interval_without_a_request() -> None:
    guard = Guard()
    guard.watch(int(WATCH_INTERVAL))
    assert guard.livekit.probes == 0
    guard.watch(int(WATCH_INTERVAL) + 1)
    assert guard.livekit.probes == guard.homeserver.probes == guard.upstream.probes == 2


@pytest.mark.parametrize("change", ["refused", "available", "lease", "secret_mismatch", "error", "failing"])
def test_change_noticed_by_another_part_is_reported_within_a_second(change: str) -> None:
    guard = Guard()
    guard.watch(3)
    if change == "refused":
        guard.homeserver.refused = "status_401"
    elif change == "available":
        guard.livekit.available = False
    elif change == "lease":
        guard.lease.held = False
    elif change == "secret_mismatch":
        guard.decisions.secret_mismatch_at = guard.clock.seconds()
    elif change == "error":
        guard.decisions.error_at = guard.clock.seconds()
    else:
        guard.enforce(fails=True)
        guard.clock.advance(3)
        guard.enforce(fails=True)
    guard.watch(1)
    assert guard.livekit.probes == 1
    guard.watch(5)
    assert guard.livekit.probes == 1


def test_the_log_has_one_line_for_each_change_and_the_gauges_follow() -> None:
    guard = Guard()
    with logged() as events:
        guard.watch(100)
        assert guard.gauges() == dict.fromkeys(RULES, 1.0)
        guard.homeserver.refused = "status_401"
        guard.watch(100)
        assert guard.gauges() == dict.fromkeys(RULES, 0.0)
        guard.homeserver.refused = None
        guard.watch(100)
    texts = named(events, "enforcing")
    assert [text.partition(":")[0] for text in texts] == [
        "everything is enforced", "not enforced", "everything is enforced",
    ]  # fmt: skip
    assert "refuses MATRIX_TOKEN (status_401)" in texts[1]


# -- the whole service -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("probes")
@pytest_twisted.ensureDeferred
async def test_a_revoked_access_token_is_reported_at_once(start_sandbox: StartSandbox) -> None:
    """The cached policy is still used then, and nobody asks for a report."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=0.1)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    with logged() as events:
        sandbox.homeserver.log_out(sandbox.admin_token)
        sandbox.guard.policies.forget_freshness(room_id)
        await sandbox.ask_token(ALICE, room_id)
        assert len(named(events, "credentials_refused")) == 1
        await until(lambda: named(events, "enforcing"), seconds=30)
    assert "refuses MATRIX_TOKEN" in named(events, "enforcing")[-1]
    assert counted(sandbox, "enforcing", rule="membership") == 0
    answer = await sandbox.operator("GET", "/readyz")
    assert answer.code == 503
    assert json.loads(answer.body)["credentials"] == {"livekit": True, "matrix": False}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("RemoveParticipant", "remove: status_500"),
        ("ListParticipants", "list participants: status_500"),
        ("internal error", "enforce: internal_error"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_guard_that_cannot_remove_anybody_is_not_ready_until_it_can(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch, what: str, reason: str
) -> None:
    monkeypatch.setattr(failing, "REPEATED_AFTER", 0.4)
    sandbox = await start_sandbox(guard_reconcile_interval=0.2)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)

    async def fail(*_: object, **__: object) -> None:
        raise KeyError

    with monkeypatch.context() as broken:
        if what == "internal error":
            broken.setattr(Entitlement, "unentitled", fail)
        else:
            sandbox.livekit.faults[what] = Fault.status(500)
        bob = sandbox.livekit.connect(old_token(BOB, room_id))
        report = await reported(sandbox, failing=True)
    assert not report["ready"]
    assert not report["enforcing"]["in_call"]
    assert any(reason in each for each in report["reasons"])
    assert bob.connected
    sandbox.livekit.faults.clear()
    await until(lambda: not bob.connected)
    await reported(sandbox, failing=False)


async def reported(sandbox: Sandbox, *, failing: bool) -> dict[str, Any]:
    """The report, once it says whether enforcement keeps failing as it should say."""
    end = reactor.seconds() + 30
    while True:
        report: dict[str, Any] = json.loads((await sandbox.operator("GET", "/readyz")).body)
        if any("enforcement keeps failing" in reason for reason in report["reasons"]) is failing:
            return report
        assert reactor.seconds() < end, report
        await deferLater(reactor, 0.05)
