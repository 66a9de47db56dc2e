# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: a sandbox of stand-ins with the guard in front, on free ports of loopback."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import hypothesis
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from lotusguard import upkeep
from lotusguard.config import Settings
from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.synapse import guarded, set_guarded, synapse  # noqa: F401 (fixtures: a real homeserver)

# The duration of an example depends on the machine, not on the code.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

StartSandbox = Callable[..., Awaitable[Sandbox]]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the person who runs the tests."""
    for name in (*Settings.model_fields, "guard_config", "state_directory", "notify_socket", "watchdog_usec"):
        monkeypatch.delenv(name.upper(), raising=False)
    for name in [name for name in os.environ if name.startswith("GUARD_")]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stand-ins are asked comes from the test, not from the guard's own look at its health."""
    monkeypatch.setattr(upkeep, "WATCH_EVERY", 3600.0)


@pytest.fixture
def probes(no_probes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard looks at its health as it does in operation."""
    monkeypatch.setattr(upkeep, "WATCH_EVERY", 1.0)


@pytest_twisted.async_yield_fixture
async def start_sandbox() -> AsyncIterator[StartSandbox]:
    """Makes a started `Sandbox` from its keyword arguments. All are stopped when the test ends.

    The lookup timeout is long: on a busy machine, the guard must not fail open in a test.
    """
    sandboxes: list[Sandbox] = []

    async def make(**settings: object) -> Sandbox:
        sandbox = Sandbox(reactor, **{"guard_lookup_timeout": 10, **settings})
        sandboxes.append(sandbox)
        await sandbox.start()
        return sandbox

    yield make
    for sandbox in sandboxes:
        await sandbox.stop()


@pytest_twisted.async_yield_fixture
async def sandbox(start_sandbox: StartSandbox) -> AsyncIterator[Sandbox]:
    """A sandbox with default settings, except that it does not reconcile."""
    yield await start_sandbox(guard_reconcile_interval=3600)


def until(condition: Callable[[], Any], seconds: float = 15.0) -> Deferred[None]:
    """Wait until a condition holds; fail after ``seconds``."""

    async def wait() -> None:
        end = reactor.seconds() + seconds
        while not condition():
            assert reactor.seconds() < end, "the condition did not become true"
            await deferLater(reactor, 0.005)

    return Deferred.fromCoroutine(wait())


def stopped_clock() -> Any:
    """A clock for a state store, whose thread reports to the real reactor: no write takes too long."""
    clock: Any = Clock()
    clock.callFromThread = reactor.callFromThread  # type: ignore[attr-defined]
    return clock
