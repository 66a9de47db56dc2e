# SPDX-License-Identifier: Apache-2.0
"""What ``/sync`` reports about one room. Sandbox.

Read from Synapse 1.163's ``handlers/sync.py``. Each function takes the room, the user, the filter and the stream
positions to cover; it returns ``None`` if there is nothing to report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from attrs import frozen

from lotusguard.sandbox.synapse.event_filter import SyncFilter
from lotusguard.sandbox.synapse.room import Event, MatrixRoom

_STRIPPED = (
    "m.room.create", "m.room.join_rules", "m.room.canonical_alias", "m.room.avatar", "m.room.encryption",
    "m.room.name", "m.room.topic",
)  # fmt: skip
"""State that is shown to invited users."""


@frozen
class Span:
    """The stream positions that one answer covers: after ``since`` (``None``: all of them) up to ``until``."""

    since: int | None
    until: int

    def __contains__(self, position: int) -> bool:
        return (self.since is None or position > self.since) and position <= self.until


def joined(room: MatrixRoom, user_id: str, wanted: SyncFilter, span: Span) -> dict[str, Any] | None:
    newly_joined = span.since is not None and _membership_at(room, user_id, span.since) != "join"
    reach = Span(None, span.until) if newly_joined else span
    entry = _entry(room, room.timeline, wanted, reach, newly_joined=newly_joined)
    if entry is None:
        return None
    return entry | {
        "account_data": {"events": []},
        "ephemeral": {"events": []},
        "unread_notifications": {"notification_count": 0, "highlight_count": 0},
        "summary": {},
    }


def left(room: MatrixRoom, user_id: str, wanted: SyncFilter, span: Span) -> dict[str, Any] | None:
    """Only reported once: not by an initial sync, and not after the departure was reported."""
    own = [(position, event) for position, event in room.timeline if _is_member_event(event, user_id)]
    if span.since is None or not own or own[-1][0] not in span:
        return None
    was_joined = any(event["content"].get("membership") == "join" for _, event in own)
    visible = room.timeline if was_joined else own
    return _entry(room, visible, wanted, Span(span.since, own[-1][0]))


def invited(room: MatrixRoom, user_id: str, wanted: SyncFilter, span: Span) -> dict[str, Any] | None:
    events = _stripped_state(room, user_id, span)
    return None if events is None else {"invite_state": {"events": events}}


def knocking(room: MatrixRoom, user_id: str, wanted: SyncFilter, span: Span) -> dict[str, Any] | None:
    events = _stripped_state(room, user_id, span)
    return None if events is None else {"knock_state": {"events": events}}


SECTIONS: dict[str, tuple[str, Callable[..., dict[str, Any] | None]]] = {
    "join": ("join", joined),
    "invite": ("invite", invited),
    "knock": ("knock", knocking),
    "leave": ("leave", left),
    "ban": ("leave", left),
}
"""By membership, the section of the answer and what to put there."""


def _entry(
    room: MatrixRoom,
    visible: Iterable[tuple[int, Event]],
    wanted: SyncFilter,
    span: Span,
    *,
    newly_joined: bool = False,
) -> dict[str, Any] | None:
    """Timeline and state of a room; ``None`` if there is nothing to report."""
    timeline = [(at, event) for at, event in visible if at in span and wanted.timeline.matches(event)]
    limit = wanted.timeline.limit
    limited = newly_joined or (len(timeline) > limit and wanted.timeline.types != [])
    timeline = timeline[-limit:] if limit else []
    if not timeline and not newly_joined and span.since is not None:
        return None
    start = timeline[0][0] if timeline else span.until + 1
    state: list[Event] = []
    if limited or span.since is None:
        state = [event for event in _state_before(room, start, span) if wanted.state.matches(event)]
    return {
        "timeline": {
            "events": [_for_client(event) for _, event in timeline],
            "prev_batch": f"s{start - 1}",
            "limited": limited,
        },
        "state": {"events": [_for_client(event) for event in state]},
    }


def _state_before(room: MatrixRoom, start: int, span: Span) -> Iterable[Event]:
    """The state before a position, without what the client knows from before the span."""
    oldest = room.timeline[0][0] if room.timeline else 0
    before: dict[tuple[str, str], Event] = {}
    kept = {event["event_id"] for _, event in room.timeline}
    if span.since is None or span.since < oldest:
        before = {key: event for key, event in room.state.items() if event["event_id"] not in kept}
    for position, event in room.timeline:
        key = (event["type"], event.get("state_key", ""))
        if position < start and position in span and "state_key" in event and key in room.state:
            before[key] = event
    return before.values()


def _stripped_state(room: MatrixRoom, user_id: str, span: Span) -> list[Event] | None:
    """The state that an invited or knocking user sees; ``None`` if it was reported before."""
    own = room.state["m.room.member", user_id]
    position = next((at for at, event in room.timeline if event is own), 0)
    if position not in span:
        return None
    keys = [(type, "") for type in _STRIPPED] + [("m.room.member", own["sender"])]
    events = [room.state[key] for key in keys if key in room.state and room.state[key] is not own]
    return [{name: event[name] for name in ("type", "state_key", "content", "sender")} for event in (*events, own)]


def _membership_at(room: MatrixRoom, user_id: str, position: int) -> str | None:
    """The user's membership at a stream position; the current one if the timeline does not reach back."""
    own = [(at, event["content"].get("membership")) for at, event in room.timeline if _is_member_event(event, user_id)]
    if not own:
        return room.membership(user_id)
    return next((membership for at, membership in reversed(own) if at <= position), None)


def _is_member_event(event: Event, user_id: str) -> bool:
    return event["type"] == "m.room.member" and event.get("state_key") == user_id


def _for_client(event: Event) -> Event:
    return {name: value for name, value in event.items() if name not in ("room_id", "user_id")}
