# SPDX-License-Identifier: Apache-2.0
"""A running call while a service is down, as people see it in Element Call."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.real.element_call.calls import two_in_a_call
from tests.real.element_call.conftest import OpenPage
from tests.real.element_call.rooms import call_room, members
from tests.real.element_call.site import Site
from tests.real.stack import Stack

MODE = "compatibility"
AWAY = 8_000.0
"""Milliseconds: longer than the guard needs to notice."""


@pytest.mark.parametrize("service", ["guard", "homeserver", "homeserver-hangs", "livekit"])
def test_outage(services: Stack, sites: Callable[[str], Site], open_page: OpenPage, service: str) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users, 2)
    alice, bob = two_in_a_call(open_page, sites(MODE), room_id, users)
    assert services.guard is not None
    if service == "guard":
        services.kill_guard()
        alice.page.wait_for_timeout(AWAY)
        alice.picture("guard-away")
        services.guard.start()
    elif service == "homeserver":
        services.synapse.stop()
        for n in range(5):
            alice.page.wait_for_timeout(5000)
            alice.picture(f"homeserver-away-{n}")
        services.synapse.start()
    elif service == "homeserver-hangs":
        with services.synapse.suspended():
            alice.page.wait_for_timeout(AWAY)
            alice.picture("homeserver-hangs")
    else:
        services.sfu.stop()
        alice.page.wait_for_timeout(3000)
        alice.picture("livekit-away")
        services.sfu.start()
        for n in range(6):
            alice.page.wait_for_timeout(5000)
            alice.picture(f"livekit-back-{n}")
    alice.page.wait_for_timeout(AWAY)
    alice.picture(f"{service}-back")
    bob.picture(f"{service}-back-bob")
    print(len(services.participants(room_id)))
    assert 0
