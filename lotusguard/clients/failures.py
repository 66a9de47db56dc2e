# SPDX-License-Identifier: Apache-2.0
"""The ways in which a call to a dependency fails."""

from __future__ import annotations


class DependencyFailed(Exception):
    """A dependency gave no usable answer.

    :ivar reason: one of a few words that fit a metric's label: ``timeout``, ``unreachable``, ``truncated``,
        ``too_large``, ``invalid_response``, ``status_500``, ``circuit_open``, ``queue_full``.
    """

    def __init__(self, dependency: str, reason: str) -> None:
        super().__init__(f"{dependency}: {reason}")
        self.dependency = dependency
        self.reason = reason


class CircuitOpen(DependencyFailed):
    """The dependency failed so often that it is not called until a probe succeeds."""

    def __init__(self, dependency: str) -> None:
        super().__init__(dependency, "circuit_open")


class TooManyCalls(DependencyFailed):
    """Too many calls to the dependency wait for a turn. Says nothing about the dependency itself."""

    def __init__(self, dependency: str) -> None:
        super().__init__(dependency, "queue_full")


class DependencyRefused(DependencyFailed):
    """The dependency works and refused: our credentials, or this one request."""
