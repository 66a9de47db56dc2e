# SPDX-License-Identifier: Apache-2.0
"""Sources that are forbidden, withheld or given back, as people see it in Element Call."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.real.element_call.calls import in_mode, sources, two_in_a_call
from tests.real.element_call.conftest import OpenPage
from tests.real.element_call.person import Person
from tests.real.element_call.rooms import call_room, members
from tests.real.element_call.site import Site
from tests.real.stack import Stack

MODE_AND_HASHED = ("compatibility", "matrix_2_0")
"""In the first one identities name their users, in the second they are hashes."""
QUALITY = "io.lotus.room_quality"
PERMISSIONS = "io.lotus.call_permissions"
A_WHILE = 3_000.0
"""Milliseconds in which a page that does something by itself has done it."""
SPEAKER = ["CAMERA", "MICROPHONE"]
SHARER = [*SPEAKER, "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"]


def publishes(stack: Stack, room_id: str, person: Person, wanted: list[str]) -> None:
    """Wait until a person publishes exactly these sources."""
    person.until(lambda: sources(stack, room_id, person.user) == wanted, f"publishing {wanted}")


def stays(stack: Stack, room_id: str, person: Person, wanted: list[str]) -> None:
    person.page.wait_for_timeout(A_WHILE)
    assert sources(stack, room_id, person.user) == wanted


@pytest.mark.parametrize("mode", MODE_AND_HASHED)
def test_a_screen_share_ends_when_it_is_forbidden_and_is_possible_once_allowed(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage, mode: str
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users)
    alice, bob = two_in_a_call(open_page, sites(mode), room_id, users)
    bob.press("screenshare")
    alice.sees_tiles(3)
    alice.sees_moving_pictures(3)
    alice.picture(in_mode("screen-share", mode))
    services.set_state(room_id, QUALITY, {"allow_screenshare": False})
    alice.sees_tiles(2)
    alice.picture(in_mode("screen-share-forbidden", mode))
    publishes(services, room_id, bob, SPEAKER)
    bob.press("screenshare")
    stays(services, room_id, bob, SPEAKER)
    bob.picture(in_mode("screen-share-forbidden-sharer", mode))
    services.set_state(room_id, QUALITY, {})
    stays(services, room_id, bob, SPEAKER)
    bob.press("screenshare")
    publishes(services, room_id, bob, SHARER)
    alice.sees_tiles(3)
    alice.sees_moving_pictures(3)


@pytest.mark.parametrize("mode", MODE_AND_HASHED)
def test_a_person_whose_camera_is_forbidden_joins_with_sound(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage, mode: str
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users, allow_camera=False)
    _, bob = two_in_a_call(open_page, sites(mode), room_id, users)
    publishes(services, room_id, bob, ["MICROPHONE"])
    bob.picture(in_mode("camera-forbidden", mode))
    bob.press("videomute")
    bob.press("videomute")
    stays(services, room_id, bob, ["MICROPHONE"])
    services.set_state(room_id, QUALITY, {})
    stays(services, room_id, bob, ["MICROPHONE"])
    bob.press("videomute")
    publishes(services, room_id, bob, SPEAKER)
    bob.sees_moving_pictures(1)
    bob.picture(in_mode("camera-allowed", mode))


@pytest.mark.parametrize("mode", MODE_AND_HASHED)
def test_a_promoted_listener_is_heard_after_they_switch_the_microphone_off_and_on(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage, mode: str
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users)
    services.set_state(room_id, PERMISSIONS, {"microphone": 50, "camera": 50, "screen_share": 50})
    services.set_level(room_id, users[0], 50)
    alice, bob = two_in_a_call(open_page, sites(mode), room_id, users)
    publishes(services, room_id, alice, SPEAKER)
    stays(services, room_id, bob, [])
    bob.picture(in_mode("listener", mode))
    services.set_level(room_id, users[1], 50)
    stays(services, room_id, bob, [])
    bob.picture(in_mode("listener-promoted", mode))
    bob.press("mute")
    stays(services, room_id, bob, [])
    bob.press("mute")
    publishes(services, room_id, bob, ["MICROPHONE"])
    bob.picture(in_mode("listener-speaks", mode))
    services.set_level(room_id, users[1], 0)
    publishes(services, room_id, bob, [])
    bob.page.wait_for_timeout(A_WHILE)
    bob.picture(in_mode("speaker-demoted", mode))
    services.set_level(room_id, users[1], 50)
    stays(services, room_id, bob, [])
    bob.press("mute")
    bob.press("mute")
    publishes(services, room_id, bob, ["MICROPHONE"])


@pytest.mark.parametrize("mode", MODE_AND_HASHED)
def test_a_listener_who_joined_muted_is_heard_with_one_press_after_the_promotion(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage, mode: str
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users)
    services.set_state(room_id, PERMISSIONS, {"microphone": 50, "camera": 50, "screen_share": 50})
    bob = open_page(users[1])
    bob.open(sites(mode).room_url(room_id))
    bob.press("mute")
    bob.press("videomute")
    bob.press_join()
    bob.is_in_the_call()
    bob.until(lambda: services.participants(room_id), "the arrival")
    services.set_level(room_id, users[1], 50)
    stays(services, room_id, bob, [])
    bob.press("mute")
    publishes(services, room_id, bob, ["MICROPHONE"])
    bob.picture(in_mode("muted-listener-speaks", mode))
