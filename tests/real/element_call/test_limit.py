# SPDX-License-Identifier: Apache-2.0
"""A limit of two as people see it in Element Call, in each of its modes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.real.element_call.calls import in_mode
from tests.real.element_call.conftest import OpenPage
from tests.real.element_call.person import PATIENCE
from tests.real.element_call.rooms import call_room, members
from tests.real.element_call.site import MODES, Site
from tests.real.stack import Stack

ASKED = {
    "legacy": {"/sfu/get", "/get_token"},
    "compatibility": {"/get_token", "/sfu/get", "/sfu/get with delay"},
    "matrix_2_0": {"/get_token", "/get_token with delay"},
}
"""What the page asks for when it joins a running call."""
SEAT_TTL = 10


@pytest.mark.parametrize("mode", MODES)
def test_a_third_person_is_refused_until_a_seat_is_free(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage, mode: str
) -> None:
    services.run_guard(pushed=True, guard_seat_ttl=SEAT_TTL)
    users = members(services, "Alice", "Bob", "Carol")
    room_id = call_room(services, users, 2)
    url = sites(mode).room_url(room_id)
    alice, bob, carol = (open_page(user) for user in users)
    for person in (alice, bob):
        person.open(url)
        person.press_join()
        person.is_in_the_call()
    alice.sees_tiles(2)
    bob.sees_tiles(2)
    alice.until(lambda: len(services.participants(room_id)) == 2, "both in the call")
    alice.sees_moving_pictures(2)
    alice.picture(in_mode("two-in-a-call", mode))
    carol.open(url)
    carol.press_join()
    carol.page.get_by_text("Technical details").wait_for(timeout=PATIENCE)
    carol.picture(in_mode("refused", mode))
    carol.is_refused("This voice channel is full.")
    carol.picture(in_mode("refused-details", mode))
    assert carol.asked()
    assert all(request.endswith(" 403") for request in carol.asked())
    assert set(bob.asked()) == {f"POST {request} 200" for request in ASKED[mode]}
    bob.press("leave")
    bob.until(lambda: len(services.participants(room_id)) == 1, "the departure")
    if mode == "legacy":  # it asked for a second token, never used it, and that token's seat is kept
        bob.page.wait_for_timeout(SEAT_TTL * 1000 + 1000)
    carol.page.reload()
    carol.press_join()
    carol.sees_tiles(2)
    alice.sees_tiles(2)
    carol.sees_moving_pictures(2)
    carol.picture(in_mode("in-once-a-seat-is-free", mode))
