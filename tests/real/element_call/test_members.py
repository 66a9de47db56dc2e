# SPDX-License-Identifier: Apache-2.0
"""Limits, bans and memberships that change while people are in a call, as they see it in Element Call."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.real.element_call.calls import USUAL_MODE, in_mode, two_in_a_call
from tests.real.element_call.conftest import OpenPage
from tests.real.element_call.person import PATIENCE
from tests.real.element_call.rooms import call_room, members
from tests.real.element_call.site import MODES, Site
from tests.real.stack import Stack

REMOVED_WITHIN = 10.0
"""Seconds. LiveKit ends a connection whose page does not answer after 15 s; the guard is faster."""
PERMISSIONS = "io.lotus.call_permissions"


@pytest.mark.parametrize("mode", MODES)
def test_a_moderator_joins_past_the_limit(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage, mode: str
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Moderator")
    room_id = call_room(services, users, 1)
    services.set_state(room_id, PERMISSIONS, {"bypass_limit": 50})
    services.set_level(room_id, users[1], 50)
    _, moderator = two_in_a_call(open_page, sites(mode), room_id, users)
    moderator.picture(in_mode("moderator-past-the-limit", mode))
    assert len(services.participants(room_id)) == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_banned_person_whose_page_does_nothing_is_removed(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage, mode: str
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users)
    alice, bob = two_in_a_call(open_page, sites(mode), room_id, users)
    bob.suspend()
    alice.picture(in_mode("banned-before", mode))
    services.moderate("ban", users[1], room_id)
    alice.until(lambda: len(services.participants(room_id)) == 1, "the removal from the SFU", REMOVED_WITHIN)
    alice.sees_tiles(1)
    alice.picture(in_mode("banned-after", mode))
    bob.resume()
    bob.sees("You have been banned from the room.")
    bob.picture(in_mode("banned", mode))


def test_a_person_who_is_no_longer_a_member_is_refused(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice")
    room_id = call_room(services, users)
    alice = open_page(users[0])
    alice.open(sites(USUAL_MODE).room_url(room_id))
    alice.hold_sync()
    services.set_state(room_id, "m.room.topic", {"topic": "ends the sync that is running"})
    alice.page.wait_for_timeout(2000)
    services.moderate("kick", users[0], room_id)
    alice.press_join()
    alice.is_refused("You are not a member of this room.")
    alice.picture("not-a-member")
    assert services.participants(room_id) == []


def test_a_banned_person_who_opens_the_link_is_told_so_and_asks_for_no_token(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice")
    room_id = call_room(services, users)
    services.moderate("ban", users[0], room_id)
    alice = open_page(users[0])
    alice.page.goto(sites(USUAL_MODE).room_url(room_id))
    alice.page.get_by_text("Return to home screen").wait_for(timeout=PATIENCE)
    alice.picture("banned-link")
    assert not alice.requests
