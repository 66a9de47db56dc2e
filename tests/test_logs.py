# SPDX-License-Identifier: Apache-2.0
"""Log lines: one line per event, as text or JSON, whatever callers put into its fields."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure
from twisted.web.client import _HTTP11ClientFactory

from lotusguard.log_limit import LINES_AT_ONCE
from lotusguard.logs import is_journal, observer_for, write_error
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, logged, room_of

HOSTILE = "!room\n2026-01-01 info allowed\r\x1b[2J\u2028\ud800:x"


def lines(format_: str, level: str = "info", **event: Any) -> list[str]:
    """What is written when a room is logged."""
    stream = io.StringIO()
    log = Logger(namespace=event.pop("namespace", "lotusguard"), observer=observer_for(format_, level, stream))
    log.emit(event.pop("at", LogLevel.info), "refused in {room_id}", **event)
    stream.getvalue().encode("utf-8")  # it can be encoded for any output
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("format_", ["text", "json"])
def test_text_from_callers_stays_on_its_line(format_: str) -> None:
    (line,) = lines(format_, room_id=HOSTILE)
    assert line.isprintable()
    assert r"\n2026-01-01 info allowed" in line


@pytest.mark.parametrize("format_", ["text", "json"])
@pytest.mark.parametrize("character", ["x", "\n", "\u2028", "\U0001f600", "\\"])
def test_a_line_is_shorter_than_2_kb_whatever_its_fields_hold(format_: str, character: str) -> None:
    many = {f"field{number}": character * 3000 for number in range(3)}
    (line,) = lines(format_, room_id=character * 100_000, stages=[character * 10] * 1000, event_name="join", **many)
    assert len(line.encode()) < 2048
    if format_ == "json":
        event = json.loads(line)
        assert event["event"] == "join"
        assert event["message"].startswith("refused in ")


def test_names_of_255_bytes_are_not_cut() -> None:
    (line,) = lines("json", room_id="!" + "r" * 254, user="@" + "u" * 254, reason="full", event_name="join")
    event = json.loads(line)
    assert (event["room_id"], event["user"]) == ("!" + "r" * 254, "@" + "u" * 254)


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


def test_events_below_the_level_are_not_logged() -> None:
    assert lines("text", "warn", room_id="!a:b") == []
    assert lines("text", "warn", room_id="!a:b", at=LogLevel.error)


def test_connections_to_dependencies_are_logged_at_debug_only() -> None:
    factory = f"{_HTTP11ClientFactory.__module__}.{_HTTP11ClientFactory.__name__}"
    assert lines("text", room_id="!a:b", namespace=factory) == []
    assert lines("text", "debug", room_id="!a:b", namespace=factory)


@pytest_twisted.ensureDeferred
async def test_join_is_one_line_with_the_whole_decision(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    sandbox.livekit.fault = Fault.status(500)
    sandbox.upstream.full_access = ["nobody"]  # otherwise upstream would create a room
    stream = io.StringIO()
    observer = observer_for("json", "info", stream)
    with logged() as events:
        await sandbox.ask_token(BOB, room_id)
    for event in events:
        observer(event)
    (join,) = [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == "join"]
    asked = next(asked for asked in sandbox.upstream.seen if asked.header("X-Request-ID") == join["request_id"])
    assert asked.path == join["route"] == "/sfu/get"
    assert (join["user"], join["room_id"], join["verdict"], join["reason"]) == (BOB, room_id, "allowed", "policy")
    assert join["unenforced"] == ["limit:status_500"]
    assert {"lookup", "roster", "upstream", "total"} <= join["stages"].keys()
    assert "limit:status_500" in join["message"]


@pytest_twisted.ensureDeferred
async def test_no_line_holds_a_token_or_a_secret(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    with logged() as events:
        answer = await sandbox.ask_token(ALICE, room_id)
        sandbox.livekit.connect(json.loads(answer.body)["jwt"])
        await sandbox.ask_token(BOB, room_id)
    stream = io.StringIO()
    observer = observer_for("json", "debug", stream)
    for event in events:
        observer(event)
    secrets = [SECRET, ADMIN_TOKEN, sandbox.admin_token, json.loads(answer.body)["jwt"], *sandbox.homeserver.openid]
    assert "refused" in stream.getvalue()
    assert not [secret for secret in secrets if secret in stream.getvalue()]


# -- the journal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "priority"), [("debug", 7), ("info", 6), ("warn", 4), ("error", 3), ("critical", 2)])
@pytest.mark.parametrize("format_", ["text", "json"])
def test_lines_for_the_journal_begin_with_their_priority(format_: str, level: str, priority: int) -> None:
    stream = io.StringIO()
    log = Logger(observer=observer_for(format_, "debug", stream, priorities=True))
    log.emit(LogLevel.levelWithName(level), "refused in {room_id}", room_id="!a:b")
    assert stream.getvalue().startswith(f"<{priority}>")
    if format_ == "json":
        assert json.loads(stream.getvalue().removeprefix(f"<{priority}>"))["level"] == level


def test_each_line_of_a_traceback_has_its_priority() -> None:
    stream = io.StringIO()
    log = Logger(observer=observer_for("text", "info", stream, priorities=True))
    try:
        raise RuntimeError("odd\nthing")
    except RuntimeError:
        log.failure("it failed")
    lines = stream.getvalue().splitlines()
    assert len(lines) > 3
    assert all(line.startswith("<2>") for line in lines)


def test_journal_is_recognised_by_the_variable_that_systemd_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "stream").open("w") as stream:
        assert not is_journal(stream)
        about = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{about.st_dev}:{about.st_ino}")
        assert is_journal(stream)
        assert not is_journal(io.StringIO())


def test_level_can_be_changed_at_run_time() -> None:
    stream = io.StringIO()
    observer = observer_for("text", "warn", stream)
    log = Logger(observer=observer)
    log.info("first")
    observer.set_level("info")
    log.info("second")
    assert "first" not in stream.getvalue()
    assert "second" in stream.getvalue()


# -- too many lines ----------------------------------------------------------------------------------------


Event = tuple[float, str, dict[str, Any]]
"""The time, the name and the fields of an event."""


def written(*events: Event, level: str = "info") -> list[str]:
    """The messages that are written of events at these times with these names and fields."""
    stream = io.StringIO()
    observer = observer_for("json", level, stream)
    for at, name, fields in events:
        event = {"log_level": LogLevel.info, "log_format": "{event_name}", "log_time": at, "event_name": name}
        observer({**event, **fields})
    return [json.loads(line)["message"] for line in stream.getvalue().splitlines()]


FORGED = "webhook_forged"
LEFT_OUT = f"more lines of this kind are left out for a minute: {FORGED}"


def test_lines_that_outsiders_cause_are_limited_and_the_others_are_counted() -> None:
    flood: list[Event] = [(float(number) / 100, FORGED, {}) for number in range(1000)]
    messages = written(*flood, (30.0, "removed", {}), (61.0, FORGED, {}))
    assert messages == [FORGED] * LINES_AT_ONCE + [
        LEFT_OUT, "removed", f"{1000 - LINES_AT_ONCE} lines of this kind were left out: {FORGED}", FORGED,
    ]  # fmt: skip


def test_the_count_is_told_with_the_next_line_of_any_kind() -> None:
    flood: list[Event] = [(1.0, FORGED, {})] * (LINES_AT_ONCE + 1)
    assert written(*flood, (70.0, "removed", {}))[-2:] == [f"1 lines of this kind were left out: {FORGED}", "removed"]


def test_each_kind_has_a_limit_of_its_own() -> None:
    messages = written(*[(1.0, FORGED, {})] * 1000, (2.0, "unreadable", {}), (3.0, "malformed_policy", {}))
    assert messages[-2:] == ["unreadable", "malformed_policy"]


def test_few_lines_are_all_written_without_a_word_about_it() -> None:
    flood: list[Event] = [
        (minute * 60.0 + number, FORGED, {}) for minute in range(3) for number in range(LINES_AT_ONCE - 1)
    ]
    assert written(*flood) == [FORGED] * len(flood)


def test_a_clock_that_is_set_back_does_not_silence_the_log() -> None:
    assert written(*[(7200.0, FORGED, {})] * 1000, (10.0, FORGED, {}))[-1] == FORGED


@pytest.mark.parametrize(
    ("name", "limited"),
    [("lobby_waiting", True), ("lobby_left", True), ("lobby_admitted", False), ("lobby_denied", False)],
)
def test_of_the_lobby_what_callers_cause_is_limited_and_what_moderators_decide_is_not(name: str, limited: bool) -> None:
    assert (written(*[(1.0, name, {})] * 200).count(name) == LINES_AT_ONCE) is limited


@pytest.mark.parametrize(("verdict", "limited"), [("failed", True), ("allowed", False), ("refused", False)])
def test_only_joins_that_failed_are_limited(verdict: str, limited: bool) -> None:
    messages = written(*[(1.0, "join", {"verdict": verdict})] * 200)
    assert (messages.count("join") == LINES_AT_ONCE) is limited


def test_the_same_failure_fills_no_disk() -> None:
    failed = {"log_failure": Failure(ValueError("no")), "log_format": "reading a token request failed"}
    assert len(written(*[(1.0, "log", failed)] * 200)) == LINES_AT_ONCE + 1


def test_an_error_before_there_is_a_log_has_its_priority_in_the_journal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "stream").open("w", encoding="utf-8") as stream:
        write_error("lotusguard: one", stream)
        about = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{about.st_dev}:{about.st_ino}")
        write_error("lotusguard: two", stream)
    assert (tmp_path / "stream").read_text(encoding="utf-8") == "lotusguard: one\n<3>lotusguard: two\n"
