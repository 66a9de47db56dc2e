# SPDX-License-Identifier: Apache-2.0
"""Sources that are forbidden, withheld or given back, as people see it in Element Call."""

from __future__ import annotations

from collections.abc import Callable

from tests.real.element_call.conftest import OpenPage
from tests.real.element_call.person import Person
from tests.real.element_call.rooms import call_room, members
from tests.real.element_call.site import Site
from tests.real.stack import Stack

QUALITY = "io.lotus.room_quality"
PERMISSIONS = "io.lotus.call_permissions"


def sources(stack: Stack, room_id: str, user: str) -> list[str]:
    """What a user publishes, as LiveKit lists it; muted tracks are left out."""
    (one,) = [one for one in stack.participants(room_id) if one["identity"].startswith(user)] or [{"tracks": []}]
    return sorted(track["source"] for track in one["tracks"] if not track["muted"])


def two_in_a_call(open_page: OpenPage, site: Site, room_id: str, users: list[str]) -> tuple[Person, Person]:
    first, second = (open_page(user) for user in users)
    for person in (first, second):
        person.open(site.room_url(room_id))
        person.press_join()
        person.is_in_the_call()
    first.sees_tiles(2)
    second.sees_tiles(2)
    return first, second


def test_screen_share_forbidden_in_mid_call(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users)
    alice, bob = two_in_a_call(open_page, sites("compatibility"), room_id, users)
    bob.press("screenshare")
    alice.sees_tiles(3)
    alice.picture("screen-share-before")
    services.set_state(room_id, QUALITY, {"allow_screenshare": False})
    alice.sees_tiles(2)
    alice.picture("screen-share-forbidden")
    bob.picture("screen-share-forbidden-sharer")
    bob.press("screenshare")
    bob.page.wait_for_timeout(6000)
    bob.picture("screen-share-refused-sharer")
    alice.sees_tiles(2)
    print(sources(services, room_id, users[1]))
    services.set_state(room_id, QUALITY, {})
    bob.page.wait_for_timeout(3000)
    bob.picture("screen-share-allowed-sharer-0")
    bob.press("screenshare")
    bob.page.wait_for_timeout(5000)
    bob.picture("screen-share-allowed-sharer")
    alice.picture("screen-share-allowed")
    print(sources(services, room_id, users[1]))
    assert 0


def test_camera_forbidden_before_the_join(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users, allow_camera=False)
    alice, bob = two_in_a_call(open_page, sites("compatibility"), room_id, users)
    bob.page.wait_for_timeout(6000)
    bob.picture("camera-forbidden")
    print(sources(services, room_id, users[0]), sources(services, room_id, users[1]))
    bob.press("videomute")
    bob.page.wait_for_timeout(1000)
    bob.picture("camera-forbidden-off")
    bob.press("videomute")
    bob.page.wait_for_timeout(4000)
    bob.picture("camera-forbidden-on")
    services.set_state(room_id, QUALITY, {})
    bob.page.wait_for_timeout(4000)
    bob.picture("camera-allowed")
    print(sources(services, room_id, users[0]), sources(services, room_id, users[1]))
    bob.press("videomute")
    bob.page.wait_for_timeout(2000)
    print(sources(services, room_id, users[0]), sources(services, room_id, users[1]))
    bob.picture("camera-allowed-1")
    bob.press("videomute")
    bob.page.wait_for_timeout(4000)
    bob.picture("camera-allowed-2")
    print(sources(services, room_id, users[0]), sources(services, room_id, users[1]))
    print([c for c in bob.console if "uncaught" in c or "ermission" in c])
    assert 0


def test_listener_promoted(
    services: Stack, sites: Callable[[str], Site], open_page: OpenPage
) -> None:
    services.run_guard(pushed=True)
    users = members(services, "Alice", "Bob")
    room_id = call_room(services, users)
    services.set_state(room_id, PERMISSIONS, {"microphone": 50, "camera": 50, "screen_share": 50})
    services.set_level(room_id, users[0], 50)
    alice, bob = two_in_a_call(open_page, sites("compatibility"), room_id, users)
    bob.page.wait_for_timeout(6000)
    bob.picture("listener")
    alice.picture("listener-speaker")
    print(sources(services, room_id, users[0]), sources(services, room_id, users[1]))
    services.set_level(room_id, users[1], 50)
    bob.page.wait_for_timeout(5000)
    bob.picture("listener-promoted")
    alice.picture("listener-promoted-speaker")
    print("promoted", sources(services, room_id, users[0]), sources(services, room_id, users[1]))
    for n in range(3):
        bob.press("mute")
        bob.page.wait_for_timeout(3000)
        bob.picture(f"listener-promoted-mute{n}")
        print("mute", n, sources(services, room_id, users[1]))
    for n in range(3):
        bob.press("videomute")
        bob.page.wait_for_timeout(3000)
        bob.picture(f"listener-promoted-video{n}")
        print("video", n, sources(services, room_id, users[1]))
    services.set_level(room_id, users[1], 0)
    bob.page.wait_for_timeout(3000)
    bob.picture("speaker-demoted")
    print("demoted", n, sources(services, room_id, users[1]))
    bob.press("mute")
    bob.page.wait_for_timeout(3000)
    bob.picture("speaker-demoted-mute")
    print([c for c in bob.console if "uncaught" in c or "ermission" in c])
    assert 0
