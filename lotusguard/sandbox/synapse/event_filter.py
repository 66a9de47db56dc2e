# SPDX-License-Identifier: Apache-2.0
"""Filters of ``/sync``: which rooms and events a client wants. Sandbox.

Read from Synapse 1.163's ``api/filtering.py``. Lazy loading of members is not implemented: all are sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from lotusguard.sandbox.synapse.room import Event

DEFAULT_LIMIT = 10
"""Events of a timeline if the filter names no limit."""


@frozen
class EventFilter:
    """One filter of events, as ``room.timeline`` and ``room.state`` are. ``None`` restricts nothing."""

    types: list[str] | None = None
    not_types: list[str] | None = None
    senders: list[str] | None = None
    not_senders: list[str] | None = None
    limit: int = DEFAULT_LIMIT

    @classmethod
    def of_json(cls, given: Mapping[str, Any]) -> EventFilter:
        return cls(**{name: given[name] for name in cls.__annotations__ if name in given})

    def matches(self, event: Event) -> bool:
        type, sender = event["type"], event["sender"]
        if self.types is not None and not any(_matches(pattern, type) for pattern in self.types):
            return False
        if any(_matches(pattern, type) for pattern in self.not_types or ()):
            return False
        return (self.senders is None or sender in self.senders) and sender not in (self.not_senders or ())


@frozen
class SyncFilter:
    """The parts of a filter that concern rooms."""

    timeline: EventFilter
    state: EventFilter
    rooms: list[str] | None
    not_rooms: list[str]

    @classmethod
    def of_json(cls, given: Mapping[str, Any]) -> SyncFilter:
        room = given.get("room", {})
        timeline, state = (EventFilter.of_json(room.get(name, {})) for name in ("timeline", "state"))
        return cls(timeline, state, room.get("rooms"), room.get("not_rooms", []))

    def wants(self, room_id: str) -> bool:
        return (self.rooms is None or room_id in self.rooms) and room_id not in self.not_rooms


def _matches(pattern: str, type: str) -> bool:
    """``*`` stands for any number of characters."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), type, re.DOTALL) is not None
