# SPDX-License-Identifier: Apache-2.0
"""The guard as a process: it stops without dropping requests, and issued holds survive ``kill -9``."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults

from lotusguard.clients.http import Answer
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, room_of
from tests.conftest import until
from tests.guardprocess import PATIENT, TWIST, ProcessSandbox


@pytest_twisted.async_yield_fixture
async def process(tmp_path: Path) -> AsyncIterator[ProcessSandbox]:
    sandbox = ProcessSandbox(reactor, guard_state_dir=tmp_path / "state", guard_log_format="json")
    await sandbox.start()
    yield sandbox
    await sandbox.stop()


async def survived(asking: Any) -> Answer | None:
    """The answer; None if the guard was killed before it answered."""
    try:
        answer: Answer = await asking
    except Exception:
        return None
    return answer


def listens(port: int) -> bool:
    """Whether a connection to the port of loopback is accepted."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def written(path: Path) -> tuple[int, int, int]:
    """How many aliases, identities and holds are on disk. Writes that no caller waits for are batched."""
    with closing(sqlite3.connect(path)) as database:
        return tuple(
            database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("aliases", "identities", "holds")
        )


@pytest_twisted.ensureDeferred
async def test_exactly_10_of_200_users_get_seats_despite_a_kill(process: ProcessSandbox) -> None:
    room_id = room_of(process, 10)
    users = [f"@u{number}:sandbox.local" for number in range(200)]
    for user in users:
        process.homeserver.add_user(user.split(":")[0][1:])
        process.homeserver.set_state(room_id, "m.room.member", {"membership": "join"}, state_key=user)
    let_in: set[str] = set()

    async def ask(user: str, new: bool) -> int | None:
        answer = await survived(process.ask_token(user, room_id, new=new))
        if answer is not None and answer.code == 200:
            let_in.add(user)
        return answer.code if answer is not None else None

    first = gatherResults([Deferred.fromCoroutine(ask(user, n % 2 == 0)) for n, user in enumerate(users)])
    await until(lambda: len(let_in) >= 3, seconds=60)
    assert await process.end("KILL") == "SIGKILL"
    await first
    already = len(let_in)
    assert 3 <= already <= 10
    await process.start_guard()
    await gatherResults([Deferred.fromCoroutine(ask(user, n % 2 == 1)) for n, user in enumerate(users)])
    assert len(let_in) == 10


@pytest_twisted.ensureDeferred
async def test_rooms_users_and_holds_survive_a_kill(process: ProcessSandbox, tmp_path: Path) -> None:
    room_id = room_of(process, 2)
    await process.enter(ALICE, room_id, new=True)
    assert (await process.ask_token(BOB, room_id)).code == 200
    await process.livekit.drained()
    await until(lambda: written(tmp_path / "state" / "lotusguard.sqlite3") == (1, 2, 2))
    await process.end("KILL")
    await process.start_guard()
    assert (await process.ask_token(CAROL, room_id)).code == 403
    assert (await process.ask_token(ALICE, room_id, new=True)).code == 200
    assert (await process.ask_token(BOB, room_id, device="TABLET")).code == 200


@pytest_twisted.ensureDeferred
async def test_sigterm_finishes_requests_in_flight_and_then_exits(process: ProcessSandbox) -> None:
    room_id = room_of(process)
    process.upstream.fault = Fault.delay(2)
    asking = Deferred.fromCoroutine(process.ask_token(ALICE, room_id))
    await until(lambda: process.upstream.seen)
    process.process.signal("TERM")
    await until(lambda: not listens(process.port))
    assert not process.process.ended.called
    with pytest.raises(Exception, match="refused"):
        await process.request("GET", process.url + "/healthz")
    assert (await asking).code == 200
    assert await process.process.ended in ("SIGTERM", 0)


@pytest_twisted.ensureDeferred
async def test_shutdown_waits_at_most_for_the_upstream_timeout(tmp_path: Path) -> None:
    sandbox = ProcessSandbox(reactor, guard_upstream_timeout=0.5, guard_upstream_grace=0.2)
    await sandbox.start()
    try:
        room_id = room_of(sandbox)
        sandbox.upstream.fault = Fault.hang()
        asking = Deferred.fromCoroutine(survived(sandbox.ask_token(ALICE, room_id)))
        await until(lambda: sandbox.upstream.seen)
        await sandbox.end("TERM")
        answer = await asking
        assert answer is None or answer.code == 504
    finally:
        await sandbox.stop()


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("corrupt", [b"not a database", b"SQLite format 3\x00" + b"\xff" * 4000])
async def test_corrupt_state_is_set_aside(process: ProcessSandbox, tmp_path: Path, corrupt: bytes) -> None:
    room_id = room_of(process, 1)
    await process.end("KILL")
    path = tmp_path / "state" / "lotusguard.sqlite3"
    for rest in ("-wal", "-shm"):
        path.with_name(path.name + rest).unlink(missing_ok=True)
    path.write_bytes(corrupt)
    await process.start_guard()
    assert "set aside" in process.process.output
    assert [found.name for found in path.parent.glob("*.corrupt-*")]
    await process.enter(ALICE, room_id)
    assert (await process.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_guard_runs_in_memory_and_reports_an_unusable_state_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    sandbox = ProcessSandbox(reactor, guard_state_dir=tmp_path / "file" / "state")
    await sandbox.start()
    try:
        room_id = room_of(sandbox, 1)
        await sandbox.enter(ALICE, room_id)
        assert (await sandbox.ask_token(BOB, room_id)).code == 403
        report = json.loads((await sandbox.operator("GET", "/readyz")).body)
        assert report["state"]["kept"] is False
        assert "state" in report["state"]["error"]
        assert "memory only" in sandbox.process.output
    finally:
        await sandbox.stop()


@pytest_twisted.ensureDeferred
async def test_each_decision_is_one_json_line(process: ProcessSandbox) -> None:
    room_id = room_of(process, 1)
    await process.ask_token(ALICE, room_id)
    await process.ask_token(BOB, room_id)
    await until(lambda: process.process.output.count('"event": "join"') == 2)
    lines = [json.loads(line) for line in process.process.output.splitlines()]
    allowed, refused = (line for line in lines if line["event"] == "join")
    assert (allowed["verdict"], allowed["user"], allowed["room_id"]) == ("allowed", ALICE, room_id)
    assert (refused["verdict"], refused["user"], refused["reason"]) == ("refused", BOB, "full")
    assert set(allowed["stages"]) >= {"lookup", "roster", "upstream", "total"}
    assert process.upstream.seen[0].header("X-Request-ID") == allowed["request_id"]


@pytest_twisted.ensureDeferred
async def test_daemonized_guard_serves_and_keeps_issued_holds(tmp_path: Path) -> None:
    """``twistd`` without ``-n`` forks after it has created the service."""
    sandbox = ProcessSandbox(reactor, guard_state_dir=tmp_path / "state")
    pidfile, logfile = tmp_path / "pid", tmp_path / "log"
    sandbox.twistd = [f"--pidfile={pidfile}", f"--logfile={logfile}", f"--rundir={tmp_path}"]
    await sandbox.start()
    pid = 0
    try:
        assert await sandbox.process.ended == 0
        pid = int(pidfile.read_text())
        room_id = room_of(sandbox, 1)
        await until(lambda: logfile.exists() and "public listener listens" in logfile.read_text())
        assert (await sandbox.ask_token(ALICE, room_id)).code == 200
        assert (await sandbox.ask_token(BOB, room_id)).code == 403
        with closing(sqlite3.connect(tmp_path / "state" / "lotusguard.sqlite3")) as database:
            assert database.execute("SELECT user FROM holds").fetchall() == [(ALICE,)]
        os.kill(pid, signal.SIGTERM)
        await until(lambda: not pidfile.exists())
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
        await sandbox.stop()


@pytest_twisted.ensureDeferred
async def test_twist_runs_the_service_with_the_configured_log(tmp_path: Path) -> None:
    sandbox = ProcessSandbox(
        reactor, guard_state_dir=tmp_path / "state", guard_log_format="json", guard_log_level="debug"
    )
    sandbox.program, sandbox.twistd = PATIENT + TWIST, ()
    await sandbox.start()
    try:
        room_id = room_of(sandbox, 1)
        assert (await sandbox.ask_token(ALICE, room_id)).code == 200
        assert (await sandbox.ask_token(BOB, room_id)).code == 403
        assert await sandbox.end("TERM") == "SIGTERM", "as `twist` ends every service"
        said = [json.loads(line) for line in sandbox.process.output.splitlines()]
        assert {line["event"] for line in said} >= {"listening", "join"}
        assert "debug" in {line["level"] for line in said}
    finally:
        await sandbox.stop()
