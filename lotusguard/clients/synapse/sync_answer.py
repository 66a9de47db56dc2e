# SPDX-License-Identifier: Apache-2.0
"""What an answer to ``/sync`` says about rooms. Events that cannot be read are skipped; the others count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import field, frozen

from lotusguard.rules.identity import is_room_id, is_short_name

MEMBER = "m.room.member"


@frozen
class RoomEvent:
    """An event of a room.

    :ivar state_key: ``None`` if it is not a state event.
    :ivar age: seconds since the event was sent, by the homeserver's clock; 0 if it is not known.
    :ivar redacts: the ID of the event that this one redacts, or ``""``.
    """

    type: str
    sender: str
    content: Any = field(repr=False)
    event_id: str = ""
    state_key: str | None = None
    age: float = 0.0
    redacts: str = ""

    @property
    def mapping(self) -> Mapping[str, Any]:
        """The content, or an empty mapping if it is not an object."""
        return self.content if isinstance(self.content, Mapping) else {}


@frozen
class JoinedRoom:
    """News of a room that the account is in. The state is older than the timeline.

    :ivar limited: events between the last answer and the timeline are missing.
    """

    state: tuple[RoomEvent, ...]
    timeline: tuple[RoomEvent, ...]
    limited: bool


@frozen
class SyncAnswer:
    """One answer.

    :ivar since: the token that the next request continues from.
    :ivar joined: news of rooms that the account is in, by room ID.
    :ivar invited: who invited the account, by room ID; ``""`` if the invitation does not say.
    :ivar left: rooms that the account is no longer in.
    """

    since: str
    joined: Mapping[str, JoinedRoom]
    invited: Mapping[str, str]
    left: frozenset[str]


def read_sync(answer: Mapping[str, Any], user_id: str, now: float | None = None) -> SyncAnswer:
    """:param user_id: whose sync it is.
    :param now: the homeserver's time, in seconds since the epoch: Dendrite does not say how old an event is.

    :raises ValueError: it is not an answer to ``/sync``.
    """
    since = answer.get("next_batch")
    if not isinstance(since, str) or not since:
        raise ValueError("no next_batch")
    rooms = _mapping(answer.get("rooms"))
    return SyncAnswer(
        since,
        {
            room_id: _joined_room(_mapping(entry), now)
            for room_id, entry in _mapping(rooms.get("join")).items()
            if is_room_id(room_id)
        },
        {room_id: _inviter(_mapping(entry), user_id) for room_id, entry in _mapping(rooms.get("invite")).items()},
        frozenset(_mapping(rooms.get("leave"))),
    )


def _joined_room(entry: Mapping[str, Any], now: float | None) -> JoinedRoom:
    timeline = _mapping(entry.get("timeline"))
    return JoinedRoom(
        tuple(_events(entry.get("state"), now)), tuple(_events(timeline, now)), bool(timeline.get("limited", False))
    )


def _inviter(entry: Mapping[str, Any], user_id: str) -> str:
    """Who invited the user; ``""`` if the events disagree.

    Beside the invitation itself there is what the inviting homeserver says about the room, unverified: it may name
    somebody else.
    """
    inviters = {
        event.sender
        for event in _events(entry.get("invite_state"), None)
        if event.type == MEMBER and event.state_key == user_id and event.mapping.get("membership") == "invite"
    }
    return inviters.pop() if len(inviters) == 1 else ""


def _events(section: object, now: float | None) -> Iterator[RoomEvent]:
    events = _mapping(section).get("events")
    for event in events if isinstance(events, list) else ():
        try:
            yield _event(event, now)
        except (TypeError, KeyError, AttributeError):
            continue


def _event(event: Mapping[str, Any], now: float | None) -> RoomEvent:
    content = event["content"]
    redacts = event.get("redacts") or _mapping(content).get("redacts") or ""
    read = RoomEvent(
        event["type"], event["sender"], content, event.get("event_id", ""), event.get("state_key"), _age(event, now),
        redacts,
    )  # fmt: skip
    texts = (read.type, read.sender, read.event_id, read.redacts, read.state_key or "")
    if not all(isinstance(text, str) and is_short_name(text) for text in texts):
        raise TypeError("not a name")
    return read


def _age(event: Mapping[str, Any], now: float | None) -> float:
    age = _mapping(event.get("unsigned")).get("age")
    if isinstance(age, int | float):
        return _seconds(age)
    sent = event.get("origin_server_ts")
    return max(0.0, now - _seconds(sent)) if now is not None and isinstance(sent, int | float) else 0.0


def _seconds(milliseconds: int | float) -> float:
    try:
        return milliseconds / 1000
    except OverflowError:
        return 0.0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
