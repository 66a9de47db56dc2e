# SPDX-License-Identifier: Apache-2.0
"""Reading Synapse's answers. An answer of an unexpected shape is invalid and raises an exception."""

from __future__ import annotations

from typing import Any

from attrs import frozen
from twisted.web.http import stringToDatetime

from lotusguard.clients.http import Answer, json_object
from lotusguard.rules.identity import is_room_id
from lotusguard.rules.state import StateEvent


def says(answer: Answer, errcode: str) -> bool:
    """Whether this is Synapse's own 404 with this code. A 404 without one comes from a proxy that does not pass the
    admin API on, and says nothing about a room."""
    return answer.code == 404 and json_object(answer).get("errcode") == errcode


def lacks_endpoint(answer: Answer) -> bool:
    """Whether a homeserver says that it does not have this endpoint: in a whole Matrix error, as all of them do."""
    return says(answer, "M_UNRECOGNIZED") and isinstance(json_object(answer).get("error"), str)


def ok(answer: Answer) -> dict[str, Any]:
    if answer.code != 200:
        raise ValueError(answer.code)
    return json_object(answer)


def answered_at(answer: Answer) -> float | None:
    """When the homeserver answered, by its own clock, in seconds since the epoch; ``None`` if it does not say."""
    date = answer.header(b"date")
    try:
        return float(stringToDatetime(date))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):
        return None


def state_event(event: dict[str, Any]) -> StateEvent:
    """:param event: as the admin API and the client API write it."""
    sender = event.get("sender", "")
    if not isinstance(sender, str):
        raise TypeError("sender is not a string")
    return StateEvent(event["type"], event["content"], sender)


def joined_rooms(answer: Answer) -> list[str]:
    return strings(ok(answer)["joined_rooms"])


def memberships(answer: Answer) -> dict[str, object]:
    found = ok(answer)["memberships"]
    if not isinstance(found, dict):
        raise TypeError("memberships is not an object")
    return found


def strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("not a list of strings")
    return value


@frozen
class RoomPage:
    """A page of the homeserver's list of rooms.

    :ivar unusable: entries without a room ID. :ivar following: where the next page begins; ``None`` after the last one.
    """

    room_ids: list[str]
    unusable: int
    following: int | None


def room_page(answer: Answer) -> RoomPage:
    page = ok(answer)
    rooms, following = page["rooms"], page.get("next_batch")
    if not isinstance(rooms, list):
        raise TypeError("rooms is not a list")
    named = [room.get("room_id") if isinstance(room, dict) else None for room in rooms]
    room_ids = [room_id for room_id in named if isinstance(room_id, str) and is_room_id(room_id)]
    is_number = isinstance(following, int) and not isinstance(following, bool)
    return RoomPage(room_ids, len(rooms) - len(room_ids), following if is_number else None)


def read_user_id(user: object) -> str:
    if not isinstance(user, str) or not user.startswith("@"):
        raise ValueError("not a user ID")
    return user
