# SPDX-License-Identifier: Apache-2.0
"""Log lines: one event one line, for people or for machines, whatever callers write into it."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from twisted.logger import Logger, LogLevel
from twisted.web.client import _HTTP11ClientFactory

from lotusguard.logs import observer_for

HOSTILE = "!room\n2026-01-01 info allowed\r\x1b[2J\u2028\ud800:x"


def lines(format_: str, level: str = "info", **event: Any) -> list[str]:
    """What is written when a room is logged."""
    stream = io.StringIO()
    log = Logger(namespace=event.pop("namespace", "lotusguard"), observer=observer_for(format_, level, stream))
    log.emit(event.pop("at", LogLevel.info), "refused in {room_id}", **event)
    stream.getvalue().encode("utf-8")  # it can be written wherever it goes
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("format_", ["text", "json"])
def test_what_a_caller_writes_stays_within_its_line(format_: str) -> None:
    (line,) = lines(format_, room_id=HOSTILE)
    assert line.isprintable()
    assert r"\n2026-01-01 info allowed" in line


def test_a_json_line_has_the_events_name_and_its_fields() -> None:
    (line,) = lines("json", room_id="!a:b", event_name="join", stages={"policy": 0.1}, at=LogLevel.warn)
    event = json.loads(line)
    assert (event["event"], event["level"], event["room_id"]) == ("join", "warn", "!a:b")
    assert event["message"] == "refused in !a:b"
    assert event["stages"] == {"policy": 0.1}


def test_a_failure_in_json_is_still_one_line() -> None:
    stream = io.StringIO()
    log = Logger(namespace="lotusguard", observer=observer_for("json", "info", stream))
    try:
        raise RuntimeError("odd\nthing")
    except RuntimeError:
        log.failure("it failed in {room_id}", room_id="!a:b")
    (line,) = stream.getvalue().splitlines()
    assert "RuntimeError" in json.loads(line)["traceback"]


def test_below_the_wanted_level_nothing_is_said() -> None:
    assert lines("text", "warn", room_id="!a:b") == []
    assert lines("text", "warn", room_id="!a:b", at=LogLevel.error)


def test_connections_to_neighbours_are_no_news_unless_asked_for() -> None:
    factory = f"{_HTTP11ClientFactory.__module__}.{_HTTP11ClientFactory.__name__}"
    assert lines("text", room_id="!a:b", namespace=factory) == []
    assert lines("text", "debug", room_id="!a:b", namespace=factory)
