# SPDX-License-Identifier: Apache-2.0
"""``deploy/upgrade`` with real venvs, pip and processes. The releases are tiny stand-ins that fail on request."""

from __future__ import annotations

import contextlib
import hashlib
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

class Listener(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self):
        served = os.environ.get("GUARD_DRY_RUN") != "on"
        if FAULT == "dies" and served and time.monotonic() - BEGAN > 0.5:
            os._exit(1)
        failed = 20 if FAULT == "fails_joins" else 1
        code, body = 200, json.dumps({{"status": "ok", "version": VERSION}})
        if self.path == "/readyz":
            code, body = (503, '{{"reasons": ["no limit"], "x": 1}}') if FAULT == "enforces_nothing" else (200, "{{}}")
        if self.path == "/metrics":
            began = time.monotonic() if FAULT == "restarts" and served else BEGAN
            body = 'lotusguard_process_start_time_seconds %s\\n' % began + \
                   'lotusguard_joins_total{{reason="policy",verdict="allowed"}} 10.0\\n' \\
                   'lotusguard_joins_total{{reason="caller_disconnected",verdict="failed"}} 500.0\\n' \\
                   'lotusguard_joins_total{{reason="internal_error",verdict="error"}} %s.0\\n' \
                   'lotusguard_joins_total{{reason="upstream_timeout",verdict="failed"}} %s.0\\n' % (
                       int(FAULT == "errs"), failed)
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
        with open(os.environ.get("REHEARSAL", os.devnull), "w") as file:
            file.write(str(os.getpid()))
        server = socketserver.UnixStreamServer(place[5:], Listener)
    else:
        socketserver.TCPServer.allow_reuse_address = True
        server = socketserver.TCPServer(("127.0.0.1", int(os.environ["PORT"])), Listener)
    print("the public listener listens on 127.0.0.1:1234", flush=True)
    server.serve_forever()

def main():
    assert os.environ["GUARD_SEEN"] == "it was read"
    if sys.argv[1] == "trial":
        rehearsal = sys.argv[2:] == ["--url", "http://127.0.0.1:1234"]
        time.sleep(2 * (FAULT == "slow_trial"))
        sys.exit(FAULT == ("fails_a_trial" if rehearsal else "fails_a_join"))
    assert sys.argv[1:] == ["check"]
    sys.exit(1 if FAULT == "fails_the_check" else 0)
"""


def wheel(folder: Path, version: str, fault: str = "") -> Path:
    """A minimal release of lotusguard."""
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
    """A host in a folder, with a restart command instead of systemd."""

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
        # a venv without pip is created faster; the tests' own pip installs into it
        python = self._script("python", f'exec "{sys.executable}" "$@" --without-pip')
        self.environment = os.environ | {
            "PORT": str(self.port),
            "PYTHONPATH": sysconfig.get_paths()["purelib"],
            "LOTUSGUARD_UNIT": "no-such-unit.service",
            "LOTUSGUARD_LEAST_SPACE": "1",
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
        """What the running release says about itself."""
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
    assert not host.pidfile.exists(), "it was started before it was configured"
    subprocess.run([str(host.restart)], env=host.environment, check=True)
    for _ in range(200):
        with contextlib.suppress(URLError):
            assert "1.0" in host.running()
            break
        time.sleep(0.05)
    return host


def test_good_release_is_installed_and_can_be_reverted(guarded: Host) -> None:
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
        ("fails_the_check", "'lotusguard check' of 1.1 fails"),
        ("does_not_start", "it does not start; nothing was changed"),
        ("fails_a_trial", "a trial join through it fails"),
        ("errs", "a trial join through it ends with an error; nothing was changed"),
    ],
)
def test_release_that_fails_before_the_switch_changes_nothing(guarded: Host, fault: str, said: str) -> None:
    before = guarded.pidfile.read_text()
    done = guarded.upgrade(wheel(guarded.folder, "1.1", fault))
    assert done.returncode == 1
    assert said in done.stderr
    assert guarded.current() == "1.0"
    assert "1.0" in guarded.running()
    assert guarded.pidfile.read_text() == before, "it was restarted without need"
    assert releases(guarded) == ["1.0"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("does_not_come_up", "1.1 does not start: going back to 1.0"),
        ("dies", "it does not answer any more: going back to 1.0"),
        ("restarts", "its process ended and was started again: going back to 1.0"),
        ("fails_a_join", "a trial join through the public listener fails: going back to 1.0"),
        ("enforces_nothing", 'it is not ready, as the old release was: "no limit": going back to 1.0'),
        ("fails_joins", "20 of 30 joins failed: going back to 1.0"),
    ],
)
def test_release_that_fails_after_the_switch_is_reverted(guarded: Host, fault: str, said: str) -> None:
    done = guarded.upgrade(wheel(guarded.folder, "1.1", fault))
    assert done.returncode == 1
    assert said in done.stdout
    assert "went back to 1.0" in done.stderr
    assert guarded.current() == "1.0"
    assert "1.0" in guarded.running()


def test_failed_installation_changes_nothing(guarded: Host) -> None:
    done = guarded.upgrade("7.7")
    assert done.returncode == 1
    assert "7.7 could not be installed; nothing was changed" in done.stderr
    assert "1.0" in guarded.running()


def test_exit_status_is_3_if_the_old_release_does_not_start_either(guarded: Host) -> None:
    done = guarded.upgrade(wheel(guarded.folder, "1.1"), LOTUSGUARD_RESTART="false")
    assert done.returncode == 3
    assert "1.0 does not start again either" in done.stderr
    assert guarded.current() == "1.0"


@pytest.mark.parametrize("arguments", [(), ("--sideways",), ("1.0; reboot",), ("a", "b"), ("./none.whl",)])
def test_wrong_usage_exits_with_status_2(host: Host, arguments: tuple[str, ...]) -> None:
    done = host.upgrade(*arguments)
    assert done.returncode == 2
    assert done.stderr


def test_second_upgrade_at_the_same_time_is_refused(guarded: Host) -> None:
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
    assert "another upgrade is running" in done.stderr


def releases(host: Host) -> list[str]:
    return sorted(path.name for path in (host.folder / "prefix" / "releases").iterdir())


def previous(host: Host) -> str:
    return (host.folder / "prefix" / "previous").readlink().name


def test_failed_installation_leaves_nothing_behind(guarded: Host) -> None:
    broken = guarded.folder / "lotusguard-1.5-py3-none-any.whl"
    broken.write_bytes(b"this is not a wheel")
    done = guarded.upgrade(broken)
    assert done.returncode == 1
    assert "could not be installed; nothing was changed" in done.stderr
    assert releases(guarded) == ["1.0"]


def test_reverted_release_does_not_become_the_previous_one(guarded: Host) -> None:
    assert guarded.upgrade(wheel(guarded.folder, "1.1")).returncode == 0
    assert previous(guarded) == "1.0"
    assert guarded.upgrade(wheel(guarded.folder, "1.2", "fails_joins")).returncode == 1
    assert guarded.current() == "1.1"
    assert previous(guarded) == "1.0"


def test_versions_that_differ_only_in_trailing_zeros_are_the_same(guarded: Host) -> None:
    for name in ("1.0.0", "1"):
        done = guarded.upgrade(wheel(guarded.folder, name))
        assert done.returncode == 1
        assert "1.0 is current already" in done.stderr
    assert releases(guarded) == ["1.0"]


def test_lack_of_disk_space_is_noticed_before_anything_is_installed(guarded: Host) -> None:
    done = guarded.upgrade(wheel(guarded.folder, "1.1"), LOTUSGUARD_LEAST_SPACE="1000000000")
    assert done.returncode == 1
    assert "1000000000 are needed; nothing was changed" in done.stderr
    assert releases(guarded) == ["1.0"]


def test_a_wheel_that_does_not_match_its_checksum_is_refused(guarded: Host) -> None:
    path = wheel(guarded.folder, "1.1")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums = guarded.folder / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  {path.name}\n")
    done = guarded.upgrade(path)
    assert done.returncode == 1
    assert "does not match SHA256SUMS" in done.stderr
    sums.write_text(f"{digest}  {path.name}\n")
    done = guarded.upgrade(path, LOTUSGUARD_WATCH_SECONDS="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{path.name} matches SHA256SUMS" in done.stdout


def test_address_of_the_operators_listener_comes_from_the_guards_settings(guarded: Host) -> None:
    with (guarded.folder / "env").open("a") as env:
        env.write(f"GUARD_ADMIN_HOST=0.0.0.0\nGUARD_ADMIN_PORT={guarded.port}\n")
    told = guarded.upgrade("--status", LOTUSGUARD_ADMIN_URL="")
    assert told.returncode == 0
    assert "running: 1.0" in told.stdout
    assert "current: 1.0" in told.stdout


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_upgrade_leaves_the_old_release_running(guarded: Host, name: str) -> None:
    upgrade = subprocess.Popen(
        [str(UPGRADE), str(wheel(guarded.folder, "1.1"))],
        env=guarded.environment | {"LOTUSGUARD_WATCH_SECONDS": "60"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals,
    )  # fmt: skip
    assert upgrade.stdout is not None
    for line in upgrade.stdout:
        if "watching it" in line:
            break
    assert "1.1" in guarded.running()
    upgrade.send_signal(signal.Signals[name])
    _, said = upgrade.communicate(timeout=60)
    assert upgrade.returncode == 1
    assert "went back to 1.0" in said
    assert guarded.current() == "1.0"
    assert "1.0" in guarded.running()


def test_after_a_killed_upgrade_back_returns_to_the_release_that_ran(guarded: Host) -> None:
    assert guarded.upgrade(wheel(guarded.folder, "1.1")).returncode == 0
    upgrade = subprocess.Popen(
        [str(UPGRADE), str(wheel(guarded.folder, "1.2"))],
        env=guarded.environment | {"LOTUSGUARD_WATCH_SECONDS": "60"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert upgrade.stdout is not None
    for line in upgrade.stdout:
        if "watching it" in line:
            break
    upgrade.kill()
    upgrade.communicate(timeout=60)
    told = guarded.upgrade("--status").stdout
    assert "an earlier upgrade was cut off (from 1.1 to 1.2); 1.2 is current. --back returns to 1.1" in told
    assert guarded.upgrade("--back").returncode == 0
    assert guarded.current() == "1.1"
    assert previous(guarded) == "1.0"
    assert "cut off" not in guarded.upgrade("--status").stdout


def test_upgrade_interrupted_before_the_switch_leaves_neither_process_nor_release(guarded: Host) -> None:
    rehearsal = guarded.folder / "rehearsal"
    upgrade = subprocess.Popen(
        [str(UPGRADE), str(wheel(guarded.folder, "1.1", "slow_trial"))],
        env=guarded.environment | {"REHEARSAL": str(rehearsal)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default_signals,
    )  # fmt: skip
    while not (rehearsal.exists() and rehearsal.read_text()):
        assert upgrade.poll() is None
        time.sleep(0.05)
    upgrade.send_signal(signal.SIGTERM)
    _, said = upgrade.communicate(timeout=60)
    assert upgrade.returncode == 1
    assert "interrupted; nothing was changed, 1.0 is current" in said
    assert not Path(f"/proc/{rehearsal.read_text()}").exists()
    assert releases(guarded) == ["1.0"]
    assert "1.0" in guarded.running()


def default_signals() -> None:
    """A shell keeps ignoring signals that were ignored when it started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_stopping_the_old_release_does_not_use_up_the_start_timeout(guarded: Host) -> None:
    slow = guarded.folder / "slow"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec "{guarded.restart}"\n')
    slow.chmod(0o755)
    done = guarded.upgrade(
        wheel(guarded.folder, "1.1"),
        LOTUSGUARD_RESTART=str(slow), LOTUSGUARD_START_SECONDS="3", LOTUSGUARD_WATCH_SECONDS="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1.1" in guarded.running()
