# SPDX-License-Identifier: Apache-2.0
"""One real stack for all tests in this folder; they are skipped where its programs are not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.real.stack import Stack, executable

RECONCILE_NEVER = 3600.0
"""Seconds: longer than any test."""
RunStack = Callable[..., Stack]


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Synapse, lk-jwt-service and livekit-server, running."""
    found = {
        variable: executable(variable, name)
        for variable, name in (("LIVEKIT_SERVER", "livekit-server"), ("LK_JWT_SERVICE", "lk-jwt-service"))
    }
    for variable, path in found.items():
        if path is None:
            pytest.skip(f"{variable} names no executable, and none is on PATH")
    for module in ("livekit.rtc", "synapse", "cryptography"):
        pytest.importorskip(module)
    stack = Stack(tmp_path_factory.mktemp("real"), str(found["LIVEKIT_SERVER"]), str(found["LK_JWT_SERVICE"]))
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def run_stack(dependencies: Stack) -> Iterator[RunStack]:
    """Gives the stack with a running guard; its settings by lower-case name. Calls end with the test."""

    def run(*, pushed: bool = False, **settings: object) -> Stack:
        dependencies.run_guard(pushed=pushed, **settings)
        return dependencies

    yield run
    dependencies.clients.tell("all_leave")


@pytest.fixture
def stack(run_stack: RunStack) -> Stack:
    """The stack with a guard that acts on webhooks only, and reads the policy whenever it needs it."""
    return run_stack(guard_reconcile_interval=RECONCILE_NEVER, guard_policy_ttl=0.001)


@pytest.fixture
def pushed_stack(run_stack: RunStack) -> Stack:
    """The stack with a guard that learns of changes from webhooks and from the module inside Synapse only."""
    return run_stack(pushed=True, guard_reconcile_interval=RECONCILE_NEVER, guard_policy_ttl=600)
