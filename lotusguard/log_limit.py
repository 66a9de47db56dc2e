# SPDX-License-Identifier: Apache-2.0
"""A limit for log lines that callers cause: so many of a kind in a minute, and a count of the others."""

from __future__ import annotations

from typing import Any

from attrs import define, field
from twisted.logger import ILogObserver, LogEvent, Logger
from zope.interface import implementer

LIMITED = frozenset(
    ("fail_open", "invite", "invite_failed", "lobby_left", "lobby_notice_failed", "lobby_notice_incomplete",
     "lobby_reaction_ignored", "lobby_timed_out", "lobby_undecidable", "lobby_waiting", "malformed_policy", "no_state",
     "not_a_member", "policy", "room_not_read", "secret_mismatch", "sign_in_failed", "unreadable",
     "vouched_for_another_server", "webhook_forged", "wrong_origin")
)  # fmt: skip
"""Events that callers can cause as often as they like, without being admitted to a call."""
LINES_AT_ONCE, LIMITED_FOR = 60, 60.0
"""Lines of one kind that are written in so many seconds."""


@define(eq=False)
class LineLimit:
    """Leaves out lines of which there are too many. Times are those of the events."""

    _began: float = field(init=False, default=0.0)
    _counts: dict[str, int] = field(init=False, factory=dict)

    def passing(self, event: LogEvent) -> list[LogEvent]:
        """What to write when an event comes: the event, unless it is left out, and what there is to say about others
        of its kind."""
        now = event.get("log_time", 0.0)
        passing = self._end(now) if self._counts else []
        kind = _limited_kind(event)
        if kind is None:
            return [*passing, event]
        if not self._counts:
            self._began = now
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count <= LINES_AT_ONCE:
            passing.append(event)
        if count == LINES_AT_ONCE:
            passing.append(_about("more lines of this kind are left out for a minute: {kind}", now, kind))
        return passing

    def _end(self, now: float) -> list[LogEvent]:
        """Begin to count anew if the time is over. :return: what was left out."""
        if 0.0 <= now - self._began < LIMITED_FOR:
            return []
        counts, self._counts = self._counts, {}
        return [
            _about("{count} lines of this kind were left out: {kind}", now, kind, count=count - LINES_AT_ONCE)
            for kind, count in counts.items()
            if count > LINES_AT_ONCE
        ]


def _limited_kind(event: LogEvent) -> str | None:
    """What an event's lines are counted as; ``None`` if they are not limited."""
    if "log_failure" in event:
        return str(event.get("log_format"))
    name = event.get("event_name")
    if name == "join" and event.get("verdict") == "failed":
        return "failed joins"  # the caller may be anybody
    return name if name in LIMITED else None


def _about(format_: str, now: float, kind: str, **more: Any) -> LogEvent:
    written: list[LogEvent] = []
    log = Logger(observer=implementer(ILogObserver)(lambda event: written.append(event)))
    log.warn(format_, kind=kind, **more, event_name="lines_left_out")
    return {**written[0], "log_time": now}
