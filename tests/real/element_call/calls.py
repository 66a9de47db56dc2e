# SPDX-License-Identifier: Apache-2.0
"""Calls that tests begin with. Tests."""

from __future__ import annotations

from collections.abc import Callable

from tests.real.element_call.person import Person
from tests.real.element_call.site import Site
from tests.real.stack import Stack


def two_in_a_call(
    open_page: Callable[[str], Person], site: Site, room_id: str, users: list[str]
) -> tuple[Person, Person]:
    """Two pages that show each other."""
    first, second = (open_page(user) for user in users)
    for person in (first, second):
        person.open(site.room_url(room_id))
        person.press_join()
        person.is_in_the_call()
    for person in (first, second):
        person.sees_tiles(2)
    return first, second


def sources(stack: Stack, room_id: str, user: str) -> list[str]:
    """What a user publishes, as LiveKit lists it; muted tracks are left out."""
    found = [one for one in stack.participants(room_id) if one["identity"].startswith(user)]
    return sorted(track["source"] for one in found for track in one["tracks"] if not track["muted"])
