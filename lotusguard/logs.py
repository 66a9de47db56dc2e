# SPDX-License-Identifier: Apache-2.0
"""Logs: text for people, JSON lines for machines."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import IO, Any

from twisted.logger import (
    FileLogObserver,
    ILogObserver,
    LogEvent,
    LogLevel,
    eventAsText,
    formatEvent,
)
from zope.interface import provider

_INTERNAL = frozenset(
    ("log_namespace", "log_level", "log_source", "log_format", "log_failure", "log_time", "log_logger", "log_system",
     "log_flattened", "format", "message", "time", "isError", "log_legacy", "log_trace")
)  # fmt: skip
_CONNECTIONS = "twisted.web.client._HTTP11ClientFactory"


def observer_for(format_: str, level: str, stream: IO[str] | None = None) -> ILogObserver:
    """The observer that ``GUARD_LOG_FORMAT`` and ``GUARD_LOG_LEVEL`` ask for.

    :param format_: ``text`` or ``json``. :param stream: standard output by default.
    """
    observer = FileLogObserver(stream or sys.stdout, _as_json if format_ == "json" else _as_text)
    least = LogLevel.levelWithName(level)
    wanted = frozenset(known for known in LogLevel.iterconstants() if known >= least)
    # each connection to a dependency has two lines, which tell nobody anything who does not ask for everything
    unheard = (_CONNECTIONS, least) if least is LogLevel.info else None

    def filtered(event: LogEvent) -> None:
        level = event.get("log_level")
        if level in wanted and (event.get("log_namespace"), level) != unheard:
            observer(event)

    heard: ILogObserver = provider(ILogObserver)(filtered)
    return heard


def _as_text(event: LogEvent) -> str:
    level = event.get("log_level", LogLevel.info).name
    text = _said(event)
    return f"{_time(event)} {level:8} {_one_line(text, event)}\n"


def _as_json(event: LogEvent) -> str:
    line: dict[str, Any] = {
        "time": _time(event),
        "level": event.get("log_level", LogLevel.info).name,
        "event": event.get("event_name", "log"),
        "logger": event.get("log_namespace", ""),
        "message": formatEvent(event) if "log_failure" in event else _said(event),
    }
    for name, value in event.items():
        if name not in _INTERNAL and name not in line and name != "event_name":
            line[name] = value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
    if "log_failure" in event:
        line["traceback"] = event["log_failure"].getTraceback()
    return json.dumps(line, default=str) + "\n"


def _said(event: LogEvent) -> str:
    """What an event says. Twisted's formatter goes through every field in Python, in case it is to be called; where
    nothing is, ``str.format`` says the same at a tenth of the cost, and each join has a line."""
    format_ = event.get("log_format")
    if isinstance(format_, str) and "()" not in format_ and "log_failure" not in event:
        try:
            return format_.format_map(event)
        except (LookupError, AttributeError, ValueError, TypeError):
            pass  # Twisted's says what is wrong with it
    return eventAsText(event, includeTimestamp=False, includeSystem=False)


def _one_line(text: str, event: LogEvent) -> str:
    """What callers wrote must not look like a line of ours, nor steer a terminal; tracebacks may have their lines."""
    if text.isprintable():
        return text
    kept = "\n" if "log_failure" in event else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)


def _time(event: LogEvent) -> str:
    return datetime.fromtimestamp(event.get("log_time", 0.0), UTC).isoformat(timespec="milliseconds")
