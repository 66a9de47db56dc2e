# SPDX-License-Identifier: Apache-2.0
"""Alerts fire at the first event and not before it, as evaluated by Prometheus (``promtool test rules``)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from lotusguard.metrics import Metrics

ALERTS = Path(__file__).parent.parent / "deploy" / "monitoring" / "alerts.yaml"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: package prometheus)"
)

FIRST_EVENTS = {
    "LotusguardInternalErrors": 'lotusguard_joins_total{verdict="error",reason="internal_error"}',
    "LotusguardFailsOpen": 'lotusguard_fail_open_total{check="policy",reason="timeout"}',
    "LotusguardSecretMismatch": "lotusguard_secret_mismatches_total",
    "LotusguardWebhooksForged": 'lotusguard_webhooks_total{outcome="forged"}',
    "LotusguardStateNotWritten": 'lotusguard_state_writes_total{outcome="failed"}',
    "LotusguardMalformedPolicy": 'lotusguard_malformed_policies_total{event="io.lotus.voice_limit"}',
}
"""Alerts on a counter, each with a series whose first event must fire it."""
GAUGES = {
    "LotusguardNotEnforcing": {
        'lotusguard_enforcing{rule="limit",instance="a"}': 0, 'lotusguard_dry_run{instance="a"}': 0,
    },
    "LotusguardCredentialsRefused": {'lotusguard_credentials_refused{dependency="synapse"}': 1},
    "LotusguardDependencyDown": {'lotusguard_circuit_open{dependency="livekit"}': 1},
    "LotusguardDryRun": {'lotusguard_dry_run{instance="a"}': 1},
    "LotusguardClockWrong": {'lotusguard_clock_skew_seconds{dependency="livekit"}': -90},
    "LotusguardDown": {'up{job="lotusguard"}': 0},
}  # fmt: skip


def labels_of(series: str) -> tuple[str, dict[str, str]]:
    name, _, labels = series.partition("{")
    return name, dict(re.findall(r'(\w+)="([^"]*)"', labels))


def promtool(folder: Path, series: dict[str, str], alert: str, at: str, *, fires: bool) -> None:
    """Let Prometheus evaluate the alert over these series, given in promtool's notation."""
    expression = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    test: dict[str, Any] = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": expression,
                        "eval_time": at,
                        "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                    }
                ],
            }
        ],
    }
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump(test))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("alert", "series"), FIRST_EVENTS.items())
def test_a_new_guard_shows_a_zero_before_the_first_event(alert: str, series: str) -> None:
    registry: CollectorRegistry = Metrics().registry
    assert registry.get_sample_value(*labels_of(series)) == 0.0, alert


@needs_promtool
@pytest.mark.parametrize(("alert", "series"), FIRST_EVENTS.items())
def test_the_first_event_fires_the_alert(alert: str, series: str, tmp_path: Path) -> None:
    promtool(tmp_path, {series: "0x20 1x20"}, alert, "6m", fires=True)
    promtool(tmp_path, {series: "0x40"}, alert, "6m", fires=False)


@needs_promtool
@pytest.mark.parametrize("alert", GAUGES)
def test_a_state_that_lasts_fires_the_alert(alert: str, tmp_path: Path) -> None:
    series = GAUGES[alert]
    lasting = {name: f"{value}x600" for name, value in series.items()}
    promtool(tmp_path, lasting, alert, "120m", fires=True)
    first, *others = series
    fine = {first: f"{0 if series[first] else 1}x600"} | {name: f"{series[name]}x600" for name in others}
    promtool(tmp_path, fine, alert, "120m", fires=False)


@needs_promtool
def test_a_dry_run_is_not_reported_as_a_failure_to_enforce(tmp_path: Path) -> None:
    series = {'lotusguard_enforcing{rule="limit",instance="a"}': "0x40", 'lotusguard_dry_run{instance="a"}': "1x40"}
    promtool(tmp_path, series, "LotusguardNotEnforcing", "9m", fires=False)


@needs_promtool
def test_callers_who_hang_up_are_not_failed_joins(tmp_path: Path) -> None:
    for reason, fires in (("upstream_timeout", True), ("caller_disconnected", False)):
        series = {
            f'lotusguard_joins_total{{verdict="failed",reason="{reason}"}}': "0+5x80",
            'lotusguard_joins_total{verdict="allowed",reason="policy"}': "0+1x80",
        }
        promtool(tmp_path, series, "LotusguardJoinsFail", "15m", fires=fires)


TOTAL = 'lotusguard_join_stage_seconds_bucket{stage="total",le="%s"}'


@needs_promtool
@pytest.mark.parametrize(("slow", "fires"), [(1, True), (0, False)])
def test_slow_joins_fire_the_alert(slow: int, fires: bool, tmp_path: Path) -> None:
    """Nine joins take less than a second, and the tenth up to five or less than one."""
    quick = 10 - slow
    series = {
        TOTAL % "1.0": f"0+{quick}x200", TOTAL % "2.5": f"0+{quick}x200",
        TOTAL % "5.0": "0+10x200", TOTAL % "+Inf": "0+10x200",
    }  # fmt: skip
    promtool(tmp_path, series, "LotusguardJoinsSlow", "30m", fires=fires)


@needs_promtool
def test_failing_enforcement_fires_the_alert_unless_it_fails_once(tmp_path: Path) -> None:
    series = 'lotusguard_enforcement_failures_total{action="list",reason="timeout"}'
    promtool(tmp_path, {series: "0+1x80"}, "LotusguardEnforcementFails", "15m", fires=True)
    promtool(tmp_path, {series: "0x20 2x60"}, "LotusguardEnforcementFails", "15m", fires=False)


@needs_promtool
def test_a_reactor_that_is_late_again_and_again_fires_the_alert(tmp_path: Path) -> None:
    series = "lotusguard_reactor_lag_seconds"
    promtool(tmp_path, {series: "0 0 0 0.8 " * 30}, "LotusguardReactorLag", "25m", fires=True)
    promtool(tmp_path, {series: "0x20 3 0x100"}, "LotusguardReactorLag", "12m", fires=False)


@needs_promtool
@pytest.mark.parametrize(
    ("joins", "webhooks", "fires"),
    [("0+1x240", "0x240", True), ("0+1x240", "0+2x240", False), ("0x240", "0x240", False)],
)
def test_joins_without_webhooks_fire_the_alert(joins: str, webhooks: str, fires: bool, tmp_path: Path) -> None:
    series = {
        'lotusguard_joins_total{verdict="allowed",reason="policy"}': joins,
        'lotusguard_webhooks_total{outcome="accepted"}': webhooks,
    }
    promtool(tmp_path, series, "LotusguardNoWebhooks", "45m", fires=fires)


def test_every_alert_is_tested_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for rule in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]:
        assert f'"{rule["alert"]}"' in text, rule["alert"]


def test_every_alert_has_a_known_severity() -> None:
    for rule in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, rule["alert"]
