# SPDX-License-Identifier: Apache-2.0
"""The guard on a disk that is really full: a small tmpfs. Mounting one needs root."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater

from tests.calls import room_of
from tests.conftest import until
from tests.guardprocess import ProcessSandbox

JOINS = 60
"""More than fit into what SQLite has allocated already."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False, timeout=60).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=60)


def fill(disk: Path) -> Path:
    """Take all space. :return: the file that takes it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert disk_usage(disk).free == 0
    return filler


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True, timeout=60)


async def report(sandbox: ProcessSandbox) -> dict[str, Any]:
    answer = await sandbox.request("GET", sandbox.admin_url + "/readyz")
    assert answer.code == 200, "everything is enforced"
    read: dict[str, Any] = json.loads(answer.body)
    return read


async def join(sandbox: ProcessSandbox, room_id: str, first: int, last: int) -> None:
    """Let new users join; each must get a token."""
    for number in range(first, last):
        user = f"@u{number}:sandbox.local"
        sandbox.homeserver.add_user(f"u{number}")
        sandbox.homeserver.set_state(room_id, "m.room.member", {"membership": "join"}, state_key=user)
        assert (await sandbox.ask_token(user, room_id, new=True)).code == 200


@pytest_twisted.ensureDeferred
async def test_people_join_while_the_disk_is_full_and_everything_is_written_afterwards(disk: Path) -> None:
    sandbox = ProcessSandbox(reactor, guard_state_dir=disk)
    try:
        await sandbox.start()
        room_id = room_of(sandbox, 1000)
        filler = fill(disk)
        await join(sandbox, room_id, 0, JOINS)
        await until(lambda: sandbox.process.output.count(".sqlite3 cannot be written") == 2)
        told = await report(sandbox)
        assert any("the state directory cannot be written" in reason for reason in told["reasons"])
        assert told["state"]["waiting_writes"] > 0
        filler.unlink()
        enlarge(disk)
        while (await report(sandbox))["state"] != {"kept": True, "writable": True, "waiting_writes": 0, "error": None}:
            await deferLater(reactor, 0.05)
        await join(sandbox, room_id, JOINS, JOINS + 1)
        await until(lambda: sandbox.process.output.count("can be written again") == 2)
        for name in ("lotusguard", "decisions"):
            said = sandbox.process.output
            assert said.count(f"{name}.sqlite3 cannot be written") == 1, said
            assert f"{name}.sqlite3 can be written again" in said
        assert "Traceback" not in said
        await sandbox.end("KILL")
        await sandbox.start_guard(guard_reconcile_interval=3600)
        rooms = json.loads((await sandbox.operator("GET", "/rooms")).body)
        assert str(rooms).count("@u") >= JOINS, "the seats are known after a restart"
    finally:
        await sandbox.stop()


@pytest.mark.parametrize("ended", ["TERM", "KILL"])
@pytest_twisted.ensureDeferred
async def test_a_guard_that_starts_on_a_full_disk_says_so_and_lets_people_join(disk: Path, ended: str) -> None:
    sandbox = ProcessSandbox(reactor, guard_state_dir=disk)
    try:
        await sandbox.start()
        room_id = room_of(sandbox, 10)
        await sandbox.end(ended)
        fill(disk)
        await sandbox.start_guard()
        state = (await report(sandbox))["state"]
        assert state["kept"] is False
        assert state["error"].endswith("no space is left"), state
        await join(sandbox, room_id, 0, 1)
    finally:
        await sandbox.stop()
