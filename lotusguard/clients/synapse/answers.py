# SPDX-License-Identifier: Apache-2.0
"""Reading Synapse's answers. An answer of an unexpected shape is invalid and raises an exception."""

from __future__ import annotations

from typing import Any

from twisted.web.http import stringToDatetime

from lotusguard.clients.http import Answer, json_object
from lotusguard.rules.state import StateEvent


def says(answer: Answer, errcode: str) -> bool:
    """Whether this is Synapse's own 404 with this code. A 404 without one comes from a proxy that does not pass the
    admin API on, and says nothing about a room."""
    return answer.code == 404 and json_object(answer).get("errcode") == errcode


def ok(answer: Answer) -> dict[str, Any]:
    if answer.code != 200:
        raise ValueError(answer.code)
    return json_object(answer)


def answered_at(answer: Answer) -> float | None:
    """When the homeserver answered, by its own clock, in seconds since the epoch; ``None`` if it does not say."""
    (date, *_) = answer.headers.getRawHeaders(b"date") or [b""]
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


def memberships(answer: Answer) -> dict[str, str]:
    memberships = ok(answer)["memberships"]
    if not isinstance(memberships, dict):
        raise TypeError("memberships is not an object")
    return memberships


def strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("not a list of strings")
    return value


def read_user_id(user: object) -> str:
    if not isinstance(user, str) or not user.startswith("@"):
        raise ValueError("not a user ID")
    return user
