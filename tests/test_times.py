# SPDX-License-Identifier: Apache-2.0
"""Histograms of times: they say the same as those of ``prometheus_client``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from lotusguard.times import BOUNDS, LabelledTimes

TIMES = (0.0, 0.0005, 0.001, 0.0011, 0.3, 0.3, 20.0, 20.1, 4000.0)


def exposed(registry: CollectorRegistry) -> list[str]:
    """What Prometheus reads, without when the metric was made."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_histogram_exposes_what_that_of_prometheus_client_does() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    times = LabelledTimes("wait_seconds", "Time of a wait", "place")
    ours.register(times)
    histogram = Histogram("wait_seconds", "Time of a wait", ["place"], buckets=BOUNDS, registry=theirs)
    for place in ("here", "there"):
        for seconds in TIMES:
            times.labels(place).observe(seconds)
            histogram.labels(place).observe(seconds)
    assert exposed(ours) == exposed(theirs)
    assert ours.get_sample_value("wait_seconds_count", {"place": "here"}) == len(TIMES)


def test_metric_without_times_has_no_samples() -> None:
    registry = CollectorRegistry()
    registry.register(LabelledTimes("wait_seconds", "Time of a wait", "place"))
    assert exposed(registry) == ["# HELP wait_seconds Time of a wait", "# TYPE wait_seconds histogram"]
