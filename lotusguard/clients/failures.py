# SPDX-License-Identifier: Apache-2.0
"""The ways in which a call to a dependency fails."""

from __future__ import annotations


class DependencyFailed(Exception):
    """A dependency gave no usable answer.

    :ivar reason: one of the words below. They are in log lines (``not enforced: policy:circuit_open``), in labels of
        metrics and in ``/readyz``; docs/metrics-and-logs.md explains them to operators.

        - ``timeout``: no answer in time. ``unreachable``: no connection. ``truncated``: half an answer.
        - ``too_large``, ``invalid_response``: an answer that cannot be used. ``status_500``: an unexpected status.
        - ``circuit_open``: it was not called, because it had failed five times in a row (`CircuitOpen`).
        - ``queue_full``: it was not called, because too many calls wait for a turn (`TooManyCalls`).
    :ivar error: what was raised while calling; None if the answer came and was not usable.
    """

    def __init__(self, dependency: str, reason: str, error: Exception | None = None) -> None:
        super().__init__(f"{dependency}: {reason}")
        self.dependency = dependency
        self.reason = reason
        self.error = error


class CircuitOpen(DependencyFailed):
    """The dependency failed five times in a row (``circuit_breaker``), so it is not called until a probe succeeds.

    Joins go on without what it would have told, and without waiting for it.
    """

    def __init__(self, dependency: str) -> None:
        super().__init__(dependency, "circuit_open")


class TooManyCalls(DependencyFailed):
    """Too many calls to the dependency wait for a turn. Says nothing about the dependency itself."""

    def __init__(self, dependency: str) -> None:
        super().__init__(dependency, "queue_full")


class DependencyRefused(DependencyFailed):
    """The dependency works and refused: our credentials, or this one request."""
