# SPDX-License-Identifier: Apache-2.0
"""Alerts, dashboard and documentation name only existing metrics and labels; the documentation names all of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import Metric

from lotusguard.metrics import Metrics
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.times import LabelledTimes

ROOT = Path(__file__).parent.parent
ALERTS = ROOT / "deploy" / "monitoring" / "alerts.yaml"
DASHBOARD = ROOT / "deploy" / "monitoring" / "dashboard.json"
METRICS_PAGE = ROOT / "docs" / "metrics-and-logs.md"

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def families() -> list[Metric]:
    """All metrics of the guard."""
    return list(Metrics().registry.collect())


def test_every_metric_name_begins_with_lotusguard() -> None:
    assert not [family.name for family in families() if not family.name.startswith("lotusguard_")]


def samples() -> dict[str, set[str]]:
    """Names of samples as in ``/metrics``, with their labels."""
    registry = Metrics().registry
    found = {}
    for family in families():
        collector = registry._names_to_collectors.get(family.name)
        labels = (
            {collector.label} if isinstance(collector, LabelledTimes) else set(getattr(collector, "_labelnames", ()))
        )
        for suffix in SUFFIXES[family.type]:
            found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def expressions() -> Iterator[str]:
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


@pytest.mark.parametrize("expression", list(expressions()))
def test_expressions_use_existing_metrics_and_labels(expression: str) -> None:
    known = samples()
    named = re.findall(r"(lotusguard_\w+)(?:\{([^}]*)\})?", expression)
    assert named or "up{" in expression
    for name, matchers in named:
        assert name in known
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) - {"instance", "job"}
        assert labels <= known[name]
    grouped = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", by)}
    assert grouped <= set().union(*(known[name] for name, _ in named), {"instance"})


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_the_expressions(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions())
    ]
    every = tmp_path / "rules.yaml"
    every.write_text(yaml.safe_dump({"groups": [{"name": "every", "rules": rules}]}))
    for path in (ALERTS, every):
        done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alert_texts_use_labels_that_their_expressions_keep() -> None:
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))))
            if not kept and "sum" not in rule["expr"]:
                kept = set().union(*samples().values())
            used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
            assert used <= kept, rule["alert"]


def test_every_alert_has_a_summary_and_is_documented() -> None:
    troubleshooting = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"].endswith((".", "?"))
            assert rule["alert"] in troubleshooting


def test_the_documentation_lists_every_metric_with_its_labels() -> None:
    listed = {
        name: set(labels.split(",")) - {""}
        for name, labels in re.findall(r"^\| `(lotusguard_\w+?)(?:\{([\w,]+)\})?` \|", METRICS_PAGE.read_text(), re.M)
    }
    wanted = {}
    for family in families():
        name = family.name + ("_total" if family.type == "counter" else "")
        wanted[name] = samples()[family.name + SUFFIXES[family.type][0]] - {"le"}
    assert listed == wanted


def test_every_cache_has_a_limit_and_is_documented(sandbox: Sandbox) -> None:
    caches = {
        family.name: {sample.labels["cache"] for sample in family.samples}
        for family in sandbox.guard.metrics.registry.collect()
        if family.name in ("lotusguard_cache_entries", "lotusguard_cache_limit")
    }
    (line,) = re.findall(r"^\| `lotusguard_cache_entries\{cache\}` .*", METRICS_PAGE.read_text(), re.M)
    documented = set(re.findall(r"`(\w+)`", line))
    assert caches == {"lotusguard_cache_entries": documented, "lotusguard_cache_limit": documented}


def test_pages_name_only_existing_metrics() -> None:
    known = set(samples()) | {family.name for family in families()}
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for name in re.findall(r"\blotusguard_[a-z_]+", page.read_text(encoding="utf-8")):
            if name != "lotusguard_plugin":
                assert name in known, page
