# SPDX-License-Identifier: Apache-2.0
"""Logs: text for people, JSON lines for machines. Callers cannot make a line long, nor break it, nor fill the disk."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import IO, Any

from attrs import define, field
from twisted.logger import (
    FileLogObserver,
    ILogObserver,
    LogEvent,
    LogLevel,
    eventAsText,
    formatEvent,
)
from zope.interface import implementer

from lotusguard.log_limit import LineLimit

_FIXED = ("time", "level", "event", "logger", "message")
_INTERNAL = frozenset(
    ("log_namespace", "log_level", "log_source", "log_format", "log_failure", "log_time", "log_logger", "log_system",
     "log_flattened", "format", "message", "time", "isError", "log_legacy", "log_trace")
)  # fmt: skip
LINE_LIMIT = 2000
"""Bytes that a line may have. Only tracebacks may be longer."""
TRACEBACK_LIMIT = 16_000
"""Characters that are kept of a traceback, from its end."""
_CUT = "…"
_CONNECTIONS = "twisted.web.client._HTTP11ClientFactory"


PRIORITIES = {"debug": 7, "info": 6, "warn": 4, "error": 3, "critical": 2}
"""The journal's priority for each level (``sd-daemon(3)``)."""


@implementer(ILogObserver)
@define(eq=False)
class LevelObserver:
    """Writes the events of a level and above, but not too many of a kind; the level can be changed while it runs.

    :ivar level: ``debug``, ``info``, ``warn``, ``error`` or ``critical``.
    """

    _observer: Callable[[LogEvent], None]
    level: str
    _wanted: frozenset[Any] = field(init=False, factory=frozenset)
    _hidden: tuple[str, Any] | None = field(init=False, default=None)
    _limit: LineLimit = field(init=False, factory=LineLimit)

    def __attrs_post_init__(self) -> None:
        self.set_level(self.level)

    def set_level(self, level: str) -> None:
        """Write the events of this level and above from now on."""
        self.level = level
        least = LogLevel.levelWithName(level)
        self._wanted = frozenset(known for known in LogLevel.iterconstants() if known >= least)
        # Twisted logs two lines for each connection to a dependency; only `debug` shows them.
        self._hidden = (_CONNECTIONS, least) if least is LogLevel.info else None

    def __call__(self, event: LogEvent) -> None:
        level = event.get("log_level")
        if level not in self._wanted or (event.get("log_namespace"), level) == self._hidden:
            return
        for each in self._limit.passing(event):
            self._observer(each)


def observer_for(
    format_: str, level: str, stream: IO[str] | None = None, *, priorities: bool | None = None
) -> LevelObserver:
    """The observer that ``GUARD_LOG_FORMAT`` and ``GUARD_LOG_LEVEL`` ask for.

    :param format_: ``text`` or ``json``. :param stream: standard output by default.
    :param priorities: begin each line with its priority for systemd's journal, such as ``<4>``; by default, if the
        stream is connected to the journal. The journal removes the prefix.
    """
    stream = stream or sys.stdout
    write = _as_json if format_ == "json" else _as_text
    if is_journal(stream) if priorities is None else priorities:
        return LevelObserver(FileLogObserver(stream, lambda event: _with_priority(write(event), event)), level)
    return LevelObserver(FileLogObserver(stream, write), level)


def is_journal(stream: IO[str]) -> bool:
    """Whether a stream is connected to systemd's journal: ``$JOURNAL_STREAM`` names the one that is."""
    try:
        about = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{about.st_dev}:{about.st_ino}"


def write_error(text: str, stream: IO[str]) -> None:
    """Write one line about an error before there is a log; in the journal it has that priority."""
    prefix = f"<{PRIORITIES['error']}>" if is_journal(stream) else ""
    stream.write(f"{prefix}{text}\n")


def _with_priority(text: str, event: LogEvent) -> str:
    """The journal takes each line for an entry, so that each line of a traceback needs the prefix."""
    prefix = f"<{PRIORITIES[event.get('log_level', LogLevel.info).name]}>"
    return "".join(f"{prefix}{line}\n" for line in text.splitlines())


def _as_text(event: LogEvent) -> str:
    level = event.get("log_level", LogLevel.info).name
    line = f"{_time(event)} {level:8} {_one_line(_message(event), event)}"
    limit = LINE_LIMIT if "log_failure" not in event else LINE_LIMIT + TRACEBACK_LIMIT
    return _cut(line, limit) + "\n"


def _as_json(event: LogEvent) -> str:
    line: dict[str, Any] = {
        "time": _time(event),
        "level": event.get("log_level", LogLevel.info).name,
        "event": event.get("event_name", "log"),
        "logger": event.get("log_namespace", ""),
        "message": _cut(formatEvent(event) if "log_failure" in event else _message(event), LINE_LIMIT // 4),
    }
    for name, value in event.items():
        if name not in _INTERNAL and name not in line and name != "event_name":
            line[name] = _plain(value)
    if "log_failure" in event:
        line["traceback"] = event["log_failure"].getTraceback()[-TRACEBACK_LIMIT:]
    return _bounded_json(line) + "\n"


def _plain(value: object) -> object:
    """A field's value, as JSON can express it; times to the microsecond."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value if isinstance(value, str | int | list | None) else str(value)


def _bounded_json(line: dict[str, Any]) -> str:
    """The line as JSON. If it is too long, its longest fields are cut, then left out; the fixed ones stay."""
    traceback = line.pop("traceback", None)
    text = json.dumps(line, default=str)
    for width in (300, 100, 40):
        if len(text) < LINE_LIMIT:
            break
        for name, value in line.items():
            whole = value if isinstance(value, str) else json.dumps(value, default=str)
            if len(json.dumps(whole)) > width:
                line[name] = _cut(whole, width)
        text = json.dumps(line, default=str)
    if len(text) >= LINE_LIMIT:
        line = {name: line[name] for name in _FIXED}
    if traceback is not None:
        line["traceback"] = traceback
    return json.dumps(line, default=str)


def _cut(text: str, limit: int) -> str:
    """At most this many bytes, as JSON writes them, where the text is longer than that."""
    if len(text) * 12 <= limit or len(json.dumps(text)) <= limit:
        return text
    low, high = 0, min(len(text), limit)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(json.dumps(text[:middle])) <= limit - 8 else (low, middle - 1)
    return text[:low] + _CUT


def _message(event: LogEvent) -> str:
    """The text of an event. Twisted's formatter inspects every field in Python because a field may be called; without
    calls ``str.format`` gives the same text at a tenth of the cost, and each join has a line."""
    format_ = event.get("log_format")
    if isinstance(format_, str) and "()" not in format_ and "log_failure" not in event:
        try:
            return format_.format_map(event)
        except (LookupError, AttributeError, ValueError, TypeError):
            pass  # Twisted's formatter explains what is wrong with it
    return eventAsText(event, includeTimestamp=False, includeSystem=False)


def _one_line(text: str, event: LogEvent) -> str:
    """Text from callers must not look like a line of ours, nor control a terminal; tracebacks keep their lines."""
    if text.isprintable():
        return text
    kept = "\n" if "log_failure" in event else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)


def _time(event: LogEvent) -> str:
    return datetime.fromtimestamp(event.get("log_time", 0.0), UTC).isoformat(timespec="milliseconds")
