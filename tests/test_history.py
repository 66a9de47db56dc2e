# SPDX-License-Identifier: Apache-2.0
"""The history of decisions: kept on disk for seven days, and shown by ``why`` and ``ejected``."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import pytest_twisted
from attrs import evolve
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from lotusguard.cli import main
from lotusguard.guard.joins.decision_store import (
    FILE_NAME,
    KEPT_FOR,
    READ_PATIENCE,
    READS,
    DecisionHistory,
    HistoryUnavailable,
    MemoryHistory,
    Question,
    Record,
    RecordKind,
    open_history,
)
from lotusguard.history.sources import NotKnown, from_journal
from lotusguard.history.telling import REFUSED, tell
from lotusguard.history.times import midnight, read_time
from lotusguard.logs import observer_for
from lotusguard.metrics import Metrics
from lotusguard.rules.refusals import Refusal
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, Sandbox
from lotusguard.terminal import Terminal
from tests.calls import ALICE, BOB, CAROL, counted, logged, named, old_token, room_of
from tests.conftest import StartSandbox, stopped_clock, until

NOW = 1_790_000_000.0
ALWAYS = Question(0.0, 1e12)


def record(**given: Any) -> Record:
    return evolve(Record(NOW, RecordKind.JOIN, BOB, "!a:b", "refused", "full"), **given)


@pytest_twisted.async_yield_fixture(params=["disk", "memory"])
async def history(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DecisionHistory]:
    directory = tmp_path if request.param == "disk" else None
    history = open_history(directory, reactor, Metrics(), time.time)
    yield history
    await history.close()


async def eventually(history: DecisionHistory, question: Question, n: int) -> list[Record]:
    """The records found, once there are this many: they are written in the background."""
    for _ in range(1000):
        found = await history.find(question)
        if len(found) >= n:
            return found
        await deferLater(reactor, 0.02)
    raise AssertionError("the records were not written")


@pytest_twisted.ensureDeferred
async def test_records_are_found_by_user_room_kind_and_time(history: DecisionHistory) -> None:
    mine = record(holders=(ALICE,), seats="limit 1", unenforced=("policy:timeout",), request_id="r1")
    others = [
        evolve(mine, user=CAROL), evolve(mine, room_id="!other:b"), evolve(mine, kind=RecordKind.REMOVAL),
        evolve(mine, at=NOW - 3600),
    ]  # fmt: skip
    for one in (*others, mine):
        history.put(one)
    await eventually(history, ALWAYS, 5)
    question = Question(NOW - 60, NOW + 60, BOB, "!a:b", RecordKind.JOIN)
    assert await history.find(question) == [mine]


@pytest_twisted.ensureDeferred
async def test_the_latest_records_are_found_oldest_first(history: DecisionHistory) -> None:
    for number in range(10):
        history.put(record(at=NOW + number))
    await eventually(history, ALWAYS, 10)
    found = await history.find(Question(0.0, 1e12, limit=3))
    assert [one.at - NOW for one in found] == [7, 8, 9]


@pytest_twisted.ensureDeferred
async def test_records_survive_a_restart_in_a_private_file(tmp_path: Path) -> None:
    history = open_history(tmp_path, reactor, Metrics(), time.time)
    history.put(record())
    await history.close()
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
    history = open_history(tmp_path, reactor, Metrics(), time.time)
    assert await history.find(ALWAYS) == [record()]
    await history.close()


@pytest_twisted.ensureDeferred
async def test_records_are_deleted_after_seven_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.guard.joins.decision_store.CLEAN_UP_INTERVAL", 0.5)
    history = open_history(tmp_path, reactor, Metrics(), lambda: NOW)
    old, new = record(at=NOW - KEPT_FOR - 60), record(at=NOW - KEPT_FOR + 60)
    history.put(old)
    history.put(new)
    await eventually(history, ALWAYS, 1)
    for _ in range(500):
        if await history.find(ALWAYS) == [new]:
            break
        await deferLater(reactor, 0.02)
    assert await history.find(ALWAYS) == [new]
    await history.close()


@pytest.mark.parametrize("wrong_by", [-3 * 86400.0, 0.0, 365 * 86400.0])
@pytest_twisted.ensureDeferred
async def test_only_old_records_are_deleted_although_the_clock_is_or_was_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong_by: float
) -> None:
    monkeypatch.setattr("lotusguard.guard.joins.decision_store.CLEAN_UP_INTERVAL", 0.2)
    monkeypatch.setattr("lotusguard.guard.joins.decision_store.DELETED_AT_ONCE", 3)
    history = open_history(tmp_path, reactor, Metrics(), lambda: NOW + min(wrong_by, 0.0))
    old = record(at=NOW - KEPT_FOR - 30 * 86400.0)
    kept = [*[record(at=NOW + max(wrong_by, 0.0))] * 4, record(at=NOW), record(at=NOW + 3600)]
    for one in [*kept[:4], old, *kept[4:]]:
        history.put(one)
    for _ in range(500):
        found = await history.find(ALWAYS)
        if found and old not in found:
            break
        await deferLater(reactor, 0.02)
    assert sorted(one.at for one in await history.find(ALWAYS)) == sorted(one.at for one in kept)
    await history.close()


class HangingDisk:
    """Opening a database takes until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes_on = Event()
        opened: Callable[..., sqlite3.Connection] = sqlite3.connect

        def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
            assert self.goes_on.wait(60)
            return opened(*arguments, **options)

        monkeypatch.setattr(sqlite3, "connect", connect)


async def unavailable(asked: Deferred[list[Record]]) -> None:
    with pytest.raises(HistoryUnavailable):
        await asked


@pytest_twisted.ensureDeferred
async def test_questions_are_given_up_while_the_disk_hangs_and_more_are_rejected_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = stopped_clock()
    history = open_history(tmp_path, clock, Metrics(), time.time)
    disk = HangingDisk(monkeypatch)
    asked = [Deferred.fromCoroutine(history.find(ALWAYS)) for _ in range(READS)]
    await unavailable(Deferred.fromCoroutine(history.find(ALWAYS)))
    assert not any(one.called for one in asked)
    clock.advance(READ_PATIENCE)
    for one in asked:
        await unavailable(one)
    await unavailable(Deferred.fromCoroutine(history.find(ALWAYS)))  # the thread is still busy
    disk.goes_on.set()
    for _ in range(500):
        with suppress(HistoryUnavailable):
            assert await history.find(ALWAYS) == []
            break
        await deferLater(reactor, 0.02)
    assert await history.find(ALWAYS) == []
    await history.close()


@pytest_twisted.ensureDeferred
async def test_a_question_that_hangs_does_not_keep_the_history_from_being_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = stopped_clock()
    history = open_history(tmp_path, clock, Metrics(), time.time)
    history.put(record())
    disk = HangingDisk(monkeypatch)
    asked = Deferred.fromCoroutine(history.find(ALWAYS))
    await history.close()
    clock.advance(READ_PATIENCE)
    await unavailable(asked)
    disk.goes_on.set()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert connection.execute("SELECT count(*) FROM records").fetchone() == (1,)


@pytest_twisted.ensureDeferred
async def test_the_file_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.guard.joins.decision_store.CLEAN_UP_INTERVAL", 0.5)
    monkeypatch.setattr("lotusguard.guard.joins.decision_store.PAGES_KEPT", 250)  # more than 500 records take
    monkeypatch.setattr("lotusguard.guard.joins.decision_store.DELETED_AT_ONCE", 500)
    history = open_history(tmp_path, reactor, Metrics(), lambda: NOW)
    for number in range(1000):
        history.put(record(at=NOW + number, request_id="r" * 1000))
    found = await history.find(ALWAYS)
    for _ in range(1500):
        if found and found[0].at > NOW and found[-1].at == NOW + 999:
            break
        await deferLater(reactor, 0.02)
        found = await history.find(ALWAYS)
    assert found[0].at >= NOW + 500, "the oldest were deleted"
    assert found[-1].at == NOW + 999
    await history.close()


@pytest_twisted.ensureDeferred
async def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"this is not SQLite" * 1000)
    with logged() as events:
        history = open_history(tmp_path, reactor, Metrics(), time.time)
    assert len(named(events, "decisions_lost")) == 1
    history.put(record())
    await history.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        assert connection.execute("SELECT count(*) FROM records").fetchone() == (1,)
    connection.close()


@pytest_twisted.ensureDeferred
async def test_a_file_that_is_locked_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotusguard.guard.joins.decision_store.LOCK_TIMEOUT", 0.0)
    history = open_history(tmp_path, reactor, Metrics(), time.time)
    history.put(record())
    await history.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as connection, logged() as events:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        await open_history(tmp_path, reactor, Metrics(), time.time).close()
    assert len(named(events, "decisions_lost")) == 1
    history = open_history(tmp_path, reactor, Metrics(), time.time)
    assert await history.find(ALWAYS) == [record()]
    await history.close()


@pytest_twisted.ensureDeferred
async def test_memory_keeps_a_bounded_number() -> None:
    history = MemoryHistory()
    for number in range(10_000):
        history.put(record(at=NOW + number))
    assert len(await history.find(Question(0.0, 1e12, limit=10_000))) <= 2_000


# -- over the wire -----------------------------------------------------------------------------------------


async def full_room(sandbox: Sandbox) -> str:
    """A room with one seat: Alice has it, Bob was refused, and Carol got in with an old token and was removed."""
    while "another guard" in str((await sandbox.operator("GET", "/readyz")).body):
        await deferLater(reactor, 0.05)  # until the guard holds the lease of its state directory
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    sandbox.livekit.connect(old_token(CAROL, room_id))
    await until(lambda: counted(sandbox, "members_removed_total", reason="full"))
    return room_id


@pytest_twisted.ensureDeferred
async def test_decisions_are_served_to_operators_only(sandbox: Sandbox) -> None:
    room_id = await full_room(sandbox)
    answer = await sandbox.operator("GET", f"/decisions?user={BOB}&kind=join")
    (refusal,) = json.loads(answer.body)["decisions"]
    assert (refusal["verdict"], refusal["reason"], refusal["room_id"]) == ("refused", "full", room_id)
    assert refusal["holders"] == [ALICE]
    assert refusal["seats"].startswith("limit 1, 1 users")
    answer = await sandbox.operator("GET", "/decisions?kind=removal")
    assert [(one["user"], one["reason"]) for one in json.loads(answer.body)["decisions"]] == [(CAROL, "full")]
    assert (await sandbox.request("GET", f"{sandbox.admin_url}/decisions")).code == 403
    for question in ("kind=nothing", "since=yesterday"):
        assert (await sandbox.operator("GET", f"/decisions?{question}")).code == 400


@pytest_twisted.ensureDeferred
async def test_operators_are_told_that_decisions_cannot_be_read(
    start_sandbox: StartSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.joins.decision_store.READ_PATIENCE", 0.1)
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    disk = HangingDisk(monkeypatch)
    answer = await sandbox.operator("GET", "/decisions")
    disk.goes_on.set()
    assert answer.code == 503
    assert json.loads(answer.body)["error"] == "Decisions cannot be read: the disk does not answer."


@pytest_twisted.ensureDeferred
async def test_line_of_a_refusal_has_the_limit_and_names_users_only_at_debug(sandbox: Sandbox) -> None:
    with logged() as events:
        await full_room(sandbox)
    (line,) = [text for text in named(events, "join") if text.startswith("refused")]
    assert "limit 1, 1 users in the call" in line
    assert ALICE not in line
    stream = io.StringIO()
    observer = observer_for("json", "debug", stream)
    for event in events:
        observer(event)
    holders = [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == "seat_holders"]
    assert [(line["level"], line["holders"]) for line in holders] == [("debug", [ALICE])]


def command(sandbox: Sandbox, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "GUARD_ADMIN_PORT": sandbox.admin_url.rpartition(":")[2], "GUARD_ADMIN_TOKEN": ADMIN_TOKEN,
        "PYTHONPATH": str(Path(__file__).parent.parent), **environment,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "lotusguard.cli", *arguments],
        env=settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest_twisted.ensureDeferred
async def test_why_and_ejected_ask_the_running_guard(start_sandbox: StartSandbox, tmp_path: Path) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_state_dir=tmp_path)
    room_id = await full_room(sandbox)
    await eventually(sandbox.guard.decision_log.kept, ALWAYS, 3)
    at = datetime.now().strftime("%H:%M")
    why = await deferToThread(command, sandbox, "why", BOB, "--at", at, "--room", room_id)
    assert why.returncode == 0, why.stderr
    assert "refused" in why.stdout
    assert "All seats of the room were taken." in why.stdout
    assert f"seats: {ALICE}" in why.stdout
    ejected = await deferToThread(command, sandbox, "ejected", "--today", "--json")
    assert [(one["user"], one["reason"]) for one in json.loads(ejected.stdout)] == [(CAROL, "full")]
    nobody = await deferToThread(command, sandbox, "why", "@nobody:sandbox.local")
    assert nobody.returncode == 1
    assert "decided nothing of the kind" in nobody.stdout


@pytest_twisted.ensureDeferred
async def test_why_names_the_fault_if_it_cannot_ask(sandbox: Sandbox) -> None:
    wrong = await deferToThread(command, sandbox, "why", BOB, GUARD_ADMIN_TOKEN="wrong")
    assert wrong.returncode == 2
    assert "does not accept the operators' token: set GUARD_ADMIN_TOKEN" in wrong.stderr
    nowhere = await deferToThread(command, sandbox, "why", BOB, GUARD_ADMIN_PORT="1")
    assert nowhere.returncode == 2
    assert "nothing listens on 127.0.0.1:1" in nowhere.stderr
    assert "--journal" in nowhere.stderr
    time_ = await deferToThread(command, sandbox, "why", BOB, "--at", "noonish")
    assert time_.returncode == 2
    assert "'noonish' is not a time; expected 14:03" in time_.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("bob",), "'bob' is not a Matrix user ID"),
        ((BOB, "--at", "14:03", "--within", "-3"), "--within -3 is not usable"),
        ((BOB, "--at", "14:03", "--within", "nan"), "--within nan is not usable"),
        ((BOB, "--at", "14:03", "--within", "inf"), "--within inf is not usable"),
        ((BOB, "--at", "0001-01-01"), "--at 0001-01-01 is out of range"),
    ],
)
def test_why_rejects_bad_usage_in_one_line(
    arguments: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["why", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lotusguard: {problem}")


@pytest.mark.parametrize("many", [1, 5000])  # of which the last ones are written when Python ends, or none
def test_nothing_is_said_about_a_reader_that_has_enough(tmp_path: Path, many: int) -> None:
    event = {
        "event": "join", "time": "2026-07-04T14:03:00+00:00", "user": BOB, "room_id": "!a:b", "verdict": "refused",
        "reason": "full",
    }  # fmt: skip
    journal = tmp_path / "journal"
    journal.write_text(f"{json.dumps(event)}\n" * many)
    reading, writing = os.pipe()
    os.close(reading)
    for asked in ([], ["--json"]):
        ended = subprocess.run(
            [sys.executable, "-m", "lotusguard.cli", "why", BOB, "--journal", str(journal), *asked],
            env={"PYTHONPATH": str(Path(__file__).parent.parent)}, stdout=writing, stderr=subprocess.PIPE, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stderr) == (141, "")
    os.close(writing)


@pytest_twisted.ensureDeferred
async def test_json_log_gives_the_same_answers(sandbox: Sandbox) -> None:
    with logged() as events:
        room_id = await full_room(sandbox)
    stream = io.StringIO()
    observer = observer_for("json", "info", stream)
    for event in events:
        observer(event)
    lines = stream.getvalue().splitlines()
    wrapped = [json.dumps({"MESSAGE": line, "PRIORITY": "6"}) for line in lines]
    for given in (lines, wrapped):
        (refusal,) = from_journal(given, evolve(ALWAYS, user=BOB))
        assert (refusal.verdict, refusal.reason, refusal.room_id) == ("refused", "full", room_id)
        (removal,) = from_journal(given, evolve(ALWAYS, kind=RecordKind.REMOVAL))
        assert (removal.user, removal.reason) == (CAROL, "full")
    with pytest.raises(NotKnown, match="GUARD_LOG_FORMAT=json"):
        from_journal(["2026-07-04T18:03:11.512+00:00 info     refused"], ALWAYS)


# -- words and times ---------------------------------------------------------------------------------------


def test_every_refusal_is_explained() -> None:
    assert set(REFUSED) == set(Refusal)


def test_text_from_callers_cannot_control_the_terminal() -> None:
    stream = io.StringIO()
    hostile = "!a\x1b[2J\nrefused:b"
    tell([record(user=hostile, room_id=hostile, request_id=hostile, holders=(hostile,))], Terminal(stream, {}), "")
    assert "\x1b" not in stream.getvalue()
    assert not any(line.startswith("refused") for line in stream.getvalue().splitlines())


ZONE = timezone(timedelta(hours=2))
TODAY = datetime(2026, 7, 4, 13, 0, 0, tzinfo=ZONE)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("12:03", datetime(2026, 7, 4, 12, 3, tzinfo=ZONE)),
        ("14:03", datetime(2026, 7, 3, 14, 3, tzinfo=ZONE)),
        ("12:03:11", datetime(2026, 7, 4, 12, 3, 11, tzinfo=ZONE)),
        ("2026-07-01", datetime(2026, 7, 1, tzinfo=ZONE)),
        ("2026-07-01T14:03", datetime(2026, 7, 1, 14, 3, tzinfo=ZONE)),
        ("2026-07-01T14:03+00:00", datetime(2026, 7, 1, 16, 3, tzinfo=ZONE)),
    ],
)
def test_times_are_read_as_operators_write_them(text: str, meant: datetime) -> None:
    assert read_time(text, TODAY) == meant


def test_today_begins_at_midnight() -> None:
    assert midnight(TODAY) == datetime(2026, 7, 4, tzinfo=ZONE)
