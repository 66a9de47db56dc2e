# SPDX-License-Identifier: Apache-2.0
"""Calls that tests begin with. Tests."""

from __future__ import annotations

from collections.abc import Callable

from tests.real.element_call.person import Person
from tests.real.element_call.site import Site
from tests.real.processes import http
from tests.real.services import OPERATORS
from tests.real.stack import Stack

USUAL_MODE = "compatibility"
"""Of Element Call, where nothing else is configured."""


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


def identities(stack: Stack, room_id: str, user: str) -> set[str]:
    """A user's identities in the call, as the guard knows them. Most modes send hashes, which tell no user."""
    rooms = http("GET", f"{stack.operators_url}/rooms", bearer=OPERATORS).content["rooms"]
    present = [one for room in rooms if room["room_id"] == room_id for one in room["present"]]
    return {one["identity"] for one in present if one["user"] == user}


def sources(stack: Stack, room_id: str, user: str) -> list[str]:
    """What a user publishes, as LiveKit lists it; muted tracks are left out."""
    theirs = identities(stack, room_id, user)
    found = [one for one in stack.participants(room_id) if one["identity"] in theirs]
    return sorted(track["source"] for one in found for track in one["tracks"] if not track["muted"])


def in_mode(name: str, mode: str) -> str:
    """The name of a screenshot: those of the usual mode are named after what they show alone."""
    return name if mode == USUAL_MODE else f"{name}-{mode}"
