# SPDX-License-Identifier: Apache-2.0
"""A running call while a service is down, as people see it in Element Call."""

from __future__ import annotations

from collections.abc import Callable
from signal import SIGKILL

import pytest

from tests.real.element_call.calls import USUAL_MODE, identities, in_mode, two_in_a_call
from tests.real.element_call.conftest import OpenPage
from tests.real.element_call.person import PATIENCE, Person
from tests.real.element_call.rooms import call_room, members
from tests.real.element_call.site import MODES, Site
from tests.real.stack import Stack

AWAY = 8_000.0
"""Milliseconds: longer than the guard needs to notice."""
LONG = 20_000.0


Call = tuple[str, Person, Person]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def call(services: Stack, sites: Callable[[str], Site], open_page: OpenPage, mode: str) -> Call:
    """Two people in a call with two seats: the room, and both pages."""
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users, 2)
    return room_id, *two_in_a_call(open_page, sites(mode), room_id, users)


def goes_on(stack: Stack, call: Call) -> None:
    """Both are in the call, see each other, and pictures arrive."""
    room_id, *people = call
    for person in people:
        person.sees_tiles(2)
        person.sees_moving_pictures(2)
    assert len(stack.participants(room_id)) == 2


def test_a_call_goes_on_while_the_guard_is_killed_and_restarted(services: Stack, call: Call, mode: str) -> None:
    room_id, alice, _ = call
    services.kill_guard()
    goes_on(services, call)
    alice.page.wait_for_timeout(AWAY)
    alice.picture(in_mode("guard-away", mode))
    goes_on(services, call)
    assert services.guard is not None
    services.guard.start()
    goes_on(services, call)
    assert services.ask_token(services.moderator, room_id).status == 403
    goes_on(services, call)


@pytest.mark.parametrize("mode", [USUAL_MODE])
def test_a_call_goes_on_while_the_homeserver_does_not_answer(services: Stack, call: Call, mode: str) -> None:
    _, alice, _ = call
    with services.synapse.suspended():
        alice.page.wait_for_timeout(AWAY)
        alice.picture(in_mode("homeserver-hangs", mode))
    goes_on(services, call)


@pytest.mark.parametrize("mode", [USUAL_MODE, "matrix_2_0"])
def test_element_call_leaves_by_itself_when_the_homeserver_refuses_connections(
    services: Stack, call: Call, mode: str
) -> None:
    room_id, alice, bob = call
    services.synapse.stop()
    try:
        for person in (alice, bob):
            person.sees("Connection lost")
        alice.picture(in_mode("homeserver-away", mode))
    finally:
        services.synapse.start()
    for person in (alice, bob):
        person.page.get_by_role("button", name="Reconnect").click(timeout=PATIENCE)
    for person in (alice, bob):
        person.sees_tiles(2)
    users = (alice.user, bob.user)
    alice.until(lambda: all(identities(services, room_id, user) for user in users), "both in the call again")


def test_a_call_goes_on_after_livekit_was_killed_and_restarted(services: Stack, call: Call, mode: str) -> None:
    room_id, alice, bob = call
    alice.page.wait_for_timeout(AWAY)  # the last requests of a join come late
    services.sfu.stop(SIGKILL)
    try:
        for person in (alice, bob):
            person.sees("Reconnecting")
        alice.picture(in_mode("livekit-away", mode))
        alice.page.wait_for_timeout(AWAY)  # they try less often by then, and hardly before the room exists
    finally:
        services.sfu.start()
    alice.until(lambda: len(services.participants(room_id)) == 2, "both in the call again")
    goes_on(services, call)
    alice.picture(in_mode("livekit-restarted", mode))
    assert services.ask_token(services.moderator, room_id).status == 403, "the seats are still theirs"


@pytest.mark.parametrize("mode", [USUAL_MODE])
def test_a_call_ends_if_the_guard_is_back_after_livekit(services: Stack, call: Call, mode: str) -> None:
    room_id, alice, bob = call
    alice.page.wait_for_timeout(AWAY)
    services.kill_guard()
    services.sfu.restart(SIGKILL)
    assert services.guard is not None
    try:
        for person in (alice, bob):
            person.sees("Reconnecting")
    finally:
        services.guard.start()
    alice.page.wait_for_timeout(LONG)
    alice.picture(in_mode("livekit-and-guard-restarted", mode))
    assert services.participants(room_id) == []
    for person in (alice, bob):
        person.page.reload()
        person.press_join()
    goes_on(services, call)
