# SPDX-License-Identifier: Apache-2.0
"""``deploy/upgrade`` with real venvs, pip and processes; only the releases are tiny, and fail when told to."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

UPGRADE = Path(__file__).parent.parent / "deploy" / "upgrade"

RELEASE = """
import json, os, socketserver, sys, time
from http.server import BaseHTTPRequestHandler

VERSION, FAULT = {version!r}, {fault!r}
BEGAN = time.monotonic()

class Door(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        served = os.environ.get("GUARD_DRY_RUN") != "on"
        if FAULT == "dies" and served and time.monotonic() - BEGAN > 0.5:
            os._exit(1)
        failed = 20 if FAULT == "fails_joins" else 1
        code, body = 200, json.dumps({{"status": "ok", "version": VERSION}})
        if self.path == "/readyz":
            code, body = (503, "not enforcing") if FAULT == "enforces_nothing" else (200, "{{}}")
        if self.path == "/metrics":
            body = 'lotusguard_joins_total{{reason="policy",verdict="allowed"}} 10.0\\n' \\
                   'lotusguard_joins_total{{reason="caller_went_away",verdict="failed"}} 500.0\\n' \\
                   'lotusguard_joins_total{{reason="upstream_timeout",verdict="failed"}} %s.0\\n' % failed
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode())

    def address_string(self): return "somebody"
    def log_message(self, *args): pass

def twistd():
    if "--help" in sys.argv:
        return
    place = sys.argv[sys.argv.index("--admin-listen") + 1] if "--admin-listen" in sys.argv else ""
    if FAULT == "does_not_start" or FAULT == "does_not_come_up" and not place:
        sys.exit("lotusguard: something is wrong")
    if place.startswith("unix:"):
        assert os.environ["GUARD_DRY_RUN"] == "on"
        server = socketserver.UnixStreamServer(place[5:], Door)
    else:
        socketserver.TCPServer.allow_reuse_address = True
        server = socketserver.TCPServer(("127.0.0.1", int(os.environ["PORT"])), Door)
    server.serve_forever()

def main():
    assert sys.argv[1:] == ["check"] and os.environ["GUARD_SEEN"] == "it was read"
    sys.exit(1 if FAULT == "fails_the_check" else 0)
"""


def wheel(folder: Path, version: str, fault: str = "") -> Path:
    """A release of lotusguard that is as small as can be."""
    path = folder / f"lotusguard-{version}-py3-none-any.whl"
    about = f"lotusguard-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinyguard.py", RELEASE.format(version=version, fault=fault))
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: lotusguard\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{about}/entry_points.txt", "[console_scripts]\nlotusguard=tinyguard:main\ntwistd=tinyguard:twistd\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return path


class Host:
    """A machine that the guard is installed on, in a folder, with a restart command instead of systemd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pidfile = folder / "pid"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "env").write_text("# settings\n\n  GUARD_SEEN=\"it was read\"\nOTHER='x'\n", encoding="utf-8")
        self.restart = self._script(
            "restart",
            f'[ ! -f "{self.pidfile}" ] || kill "$(cat "{self.pidfile}")" 2>/dev/null && sleep 0.2 || true\n'
            f'set -a; . "{folder}/env"\n'
            f'"{folder}/prefix/current/bin/twistd" -n --pidfile= lotusguard </dev/null >"{folder}/log" 2>&1 &\n'
            f'echo $! >"{self.pidfile}"',
        )
        # venvs without a pip of their own are made in a moment; they get the one we run with
        python = self._script("python", f'exec "{sys.executable}" "$@" --without-pip')
        self.environment = os.environ | {
            "PORT": str(self.port),
            "PYTHONPATH": sysconfig.get_paths()["purelib"],
            "LOTUSGUARD_PREFIX": str(folder / "prefix"),
            "LOTUSGUARD_ENV_FILE": str(folder / "env"),
            "LOTUSGUARD_RESTART": str(self.restart),
            "LOTUSGUARD_ADMIN_URL": f"http://127.0.0.1:{self.port}",
            "LOTUSGUARD_START_SECONDS": "10",
            "LOTUSGUARD_WATCH_SECONDS": "2",
            "LOTUSGUARD_POLL_SECONDS": "0.1",
            "LOTUSGUARD_PYTHON": str(python),
            "LOTUSGUARD_PIP_ARGS": "--no-index --no-deps",
        }

    def _script(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def upgrade(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(UPGRADE), *map(str, arguments)],
            env=self.environment | environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def running(self) -> str:
        """The version that answers."""
        with urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5) as answer:
            return str(answer.read())

    def current(self) -> str:
        return (self.folder / "prefix" / "current").readlink().name

    def stop(self) -> None:
        if self.pidfile.exists():
            pid = int(self.pidfile.read_text())
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
                time.sleep(0.01)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.stop()


@pytest.fixture
def guarded(host: Host) -> Host:
    """A host with release 1.0 running."""
    done = host.upgrade(wheel(host.folder, "1.0"), LOTUSGUARD_RESTART="false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not host.pidfile.exists(), "it was started before anybody had configured it"
    subprocess.run([str(host.restart)], env=host.environment, check=True)
    for _ in range(200):
        with contextlib.suppress(URLError):
            assert "1.0" in host.running()
            break
        time.sleep(0.05)
    return host


def test_a_good_release_is_switched_to_and_the_way_back_stays_open(guarded: Host) -> None:
    done = guarded.upgrade(wheel(guarded.folder, "1.1"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1.1" in guarded.running()
    assert guarded.current() == "1.1"
    back = guarded.upgrade("--back", LOTUSGUARD_WATCH_SECONDS="0")
    assert back.returncode == 0, back.stdout + back.stderr
    assert "1.0" in guarded.running()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("fails_the_check", "finds fault; nothing was changed"),
        ("does_not_start", "does not start; nothing was changed"),
    ],
)
def test_a_release_that_is_no_good_is_never_switched_to(guarded: Host, fault: str, said: str) -> None:
    before = guarded.pidfile.read_text()
    done = guarded.upgrade(wheel(guarded.folder, "1.1", fault))
    assert done.returncode == 1
    assert said in done.stderr
    assert guarded.current() == "1.0"
    assert "1.0" in guarded.running()
    assert guarded.pidfile.read_text() == before, "it was restarted for nothing"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("does_not_come_up", "1.1 does not come up: going back to 1.0"),
        ("dies", "it stopped answering: going back to 1.0"),
        ("enforces_nothing", "it does not enforce what the old release did: not enforcing: going back to 1.0"),
        ("fails_joins", "20 of 30 joins failed: going back to 1.0"),
    ],
)
def test_a_release_that_turns_out_broken_is_taken_out_by_itself(guarded: Host, fault: str, said: str) -> None:
    done = guarded.upgrade(wheel(guarded.folder, "1.1", fault))
    assert done.returncode == 1
    assert said in done.stdout
    assert "went back to 1.0" in done.stderr
    assert guarded.current() == "1.0"
    assert "1.0" in guarded.running()


def test_what_cannot_be_installed_changes_nothing(guarded: Host) -> None:
    done = guarded.upgrade("7.7")
    assert done.returncode == 1
    assert "7.7 could not be installed; nothing was changed" in done.stderr
    assert "1.0" in guarded.running()


def test_when_nothing_comes_up_any_more_it_says_so_with_a_status_of_its_own(guarded: Host) -> None:
    done = guarded.upgrade(wheel(guarded.folder, "1.1"), LOTUSGUARD_RESTART="false")
    assert done.returncode == 3
    assert "1.0 does not come up again either" in done.stderr
    assert guarded.current() == "1.0"


@pytest.mark.parametrize("arguments", [(), ("--sideways",), ("1.0; reboot",), ("a", "b"), ("./none.whl",)])
def test_wrong_usage_is_told_from_failure(host: Host, arguments: tuple[str, ...]) -> None:
    done = host.upgrade(*arguments)
    assert done.returncode == 2
    assert done.stderr


def test_two_upgrades_at_once_are_one_too_many(guarded: Host) -> None:
    lock = guarded.folder / "prefix" / ".upgrade.lock"
    with subprocess.Popen(
        ["flock", str(lock), "sh", "-c", "echo held; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = guarded.upgrade("1.1")
        other.communicate("")
    assert done.returncode == 1
    assert "another upgrade is under way" in done.stderr
