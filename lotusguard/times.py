# SPDX-License-Identifier: Apache-2.0
"""Histograms of times that one thread counts.

A join is observed five times. ``prometheus_client``'s own histogram takes two locks for each and compares the time with
one bound after the other, which was 3 % of a join.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from attrs import Factory, define, field
from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
"""The upper bounds of the buckets, in seconds."""
_NAMES = (*map(str, BOUNDS), "+Inf")


@define(eq=False)
class Times:
    """How many times were within each bound.

    :ivar counts: by bucket; the last one is without a bound. :ivar total: the sum of all times.
    """

    counts: list[int] = Factory(lambda: [0] * len(_NAMES))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """Something took so long."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


@define(eq=False)
class LabelledTimes(Collector):
    """A metric: times by the value of one label."""

    _name: str
    _meaning: str
    label: str
    _by_value: dict[str, Times] = field(factory=dict, init=False)

    def labels(self, value: str) -> Times:
        """The times of one value of the label."""
        times = self._by_value.get(value)
        if times is None:
            times = self._by_value[value] = Times()
        return times

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._meaning, labels=[self.label])
        for value, times in self._by_value.items():
            family.add_metric([value], list(zip(_NAMES, accumulate(times.counts), strict=True)), times.total)
        yield family

    describe = collect  # so that the registry refuses a second metric of the same name
