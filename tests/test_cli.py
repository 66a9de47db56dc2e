# SPDX-License-Identifier: Apache-2.0
"""The ``lotusguard`` command, run in a process of its own as operators run it."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lotusguard import __version__

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "lotusguard.cli"]
SECRET = "a-secret-that-must-not-be-told-to-anybody"


def environment(**settings: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **settings}


def lotusguard(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(**settings), cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def free_port() -> int:
    with socket.socket() as trying:
        trying.bind(("127.0.0.1", 0))
        port: int = trying.getsockname()[1]
        return port


def nowhere() -> dict[str, str]:
    """Settings with addresses of dependencies where nothing listens, and with free ports for the guard."""
    names = ("GUARD_UPSTREAM", "LIVEKIT_API", "SYNAPSE_API")
    addresses = {name: f"http://127.0.0.1:{free_port()}" for name in names}
    return addresses | {"GUARD_BIND_PORT": str(free_port()), "GUARD_ADMIN_PORT": str(free_port())}


def default_sigint() -> None:
    """A shell makes background jobs ignore SIGINT, and child processes inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=default_sigint,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_version_option_prints_the_version() -> None:
    asked = lotusguard("--version")
    assert (asked.returncode, asked.stdout) == (0, f"lotusguard {__version__}\n")


def test_missing_command_prints_the_help_and_fails() -> None:
    asked = lotusguard()
    assert asked.returncode == 2
    assert "sandbox" in asked.stderr
    assert "check" in asked.stderr
    assert "twistd -n lotusguard" in asked.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("GUARD_UPSTREAM", "ws://127.0.0.1:8071", "'ws://127.0.0.1:8071' is not an http(s) URL"),
        ("LIVEKIT_API", "localhost:7880", "'localhost:7880' is not an http(s) URL"),
        ("GUARD_BIND_PORT", "80a", "expected a port number"),
        ("GUARD_POLICY_TTL", "-1", "expected a number of seconds greater than 0"),
        ("GUARD_DRY_RUN", "perhaps", "expected on or off"),
        ("GUARD_OVERFLOW", "kick", "eject"),
        ("MATRIX_TOKEN_FROM_FILE", "/does/not/exist", "cannot be read"),
        ("LIVEKIT_KEY_FILE", "/dev/null", "does not hold one key and one secret"),
        ("GUARD_CONFIG", "/does/not/exist.yaml", "is not a file"),
    ],
)
def test_wrong_setting_is_reported_in_one_line_with_exit_status_2(name: str, value: str, said: str) -> None:
    asked = lotusguard("check", **{name: value, "LIVEKIT_SECRET": SECRET})
    assert asked.returncode == 2
    assert asked.stdout == ""
    lines = asked.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"lotusguard: {name}: ")
    assert said in lines[0]
    assert SECRET not in asked.stderr


def test_wrong_setting_is_reported_as_json_too() -> None:
    asked = lotusguard("check", "--json", GUARD_BIND_PORT="99999")
    assert asked.returncode == 2
    report = json.loads(asked.stdout)
    assert report["fine"] is False
    assert report["error"].startswith("GUARD_BIND_PORT: ")


def test_check_prints_faults_with_remedies() -> None:
    settings = nowhere()
    asked = lotusguard("check", **settings, LIVEKIT_KEY="key", LIVEKIT_SECRET=SECRET, MATRIX_TOKEN=SECRET)
    assert asked.returncode == 1
    assert asked.stderr == ""
    for name in ("SYNAPSE_API", "LIVEKIT_API", "GUARD_UPSTREAM"):
        assert f"nothing listens on {settings[name].removeprefix('http://')}" in asked.stdout
        assert f"→ start it, or correct the address in {name} ({settings[name]})" in asked.stdout
    assert asked.stdout.splitlines()[-1].startswith("✗ 3 wrong")
    assert SECRET not in asked.stdout
    assert "\x1b" not in asked.stdout


def test_check_prints_the_same_faults_as_json() -> None:
    asked = lotusguard("check", "--json", **nowhere())
    assert asked.returncode == 1
    report = json.loads(asked.stdout)
    assert report["fine"] is False
    assert report["version"] == __version__
    wrong = {(one["about"], one["asked"]) for one in report["findings"] if one["state"] == "wrong"}
    assert wrong == {
        ("synapse", "reachable"),
        ("livekit", "reachable"),
        ("livekit", "key"),
        ("lk-jwt-service", "reachable"),
    }
    assert all(one["remedy"] for one in report["findings"] if one["state"] in ("wrong", "warning"))


def test_demo_succeeds_and_ignores_the_operators_settings(tmp_path: Path) -> None:
    state = tmp_path / "state"
    asked = lotusguard(
        "sandbox",
        "--demo",
        GUARD_STATE_DIR=str(state),
        GUARD_DRY_RUN="on",
        LIVEKIT_KEY_FILE="/does/not/exist",
        GUARD_CONFIG="/does/not/exist",
    )
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert re.match(r"✓ All \d+ steps succeeded in ", asked.stdout.splitlines()[-1])
    assert asked.stderr == "", "the log must not be mixed in"
    assert not state.exists()


def test_demo_fails_if_the_guard_enforces_nothing() -> None:
    sabotaged = (
        "import sys; from lotusguard.sandbox.demo import demo; demo.SETTINGS['guard_dry_run'] = True; "
        "from lotusguard.cli import main; sys.exit(main(['sandbox', '--demo', '--verbose']))"
    )
    asked = subprocess.run(
        [sys.executable, "-c", sabotaged], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 1
    assert "carol is refused: answered 200" in asked.stdout.splitlines()[-1]
    assert "would_refuse @carol:sandbox.local" in asked.stderr, "--verbose shows the guard's log"


def test_interrupted_demo_exits_with_status_130() -> None:
    with running("sandbox", "--demo") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "alice joins" in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_demo_uses_colours_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    demo = [*COMMAND, "sandbox", "--demo"]
    process = subprocess.Popen(demo, env=environment(TERM="xterm"), cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while b"alice joins" not in seen:
            seen += os.read(ours, 4096)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "\x1b[32m✓\x1b[0m".encode() in seen


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="needs curl and bash")
def test_commands_printed_by_the_sandbox_work_when_pasted() -> None:
    with running("sandbox") as process:
        assert process.stdout is not None
        script = ""
        for line in process.stdout:
            script += line
            if "Ctrl-C" in line:
                break
        # Interactive, as when pasted: history expansion must not change the `!` of room IDs.
        pasted = subprocess.run(
            ["bash", "--norc", "--noprofile", "-i"], env=environment(HISTFILE="/dev/null", PS1=""),
            input=script, capture_output=True, text=True, timeout=60, start_new_session=True,
        )  # fmt: skip
        assert pasted.returncode == 0, pasted.stderr
        assert "event not found" not in pasted.stderr
        assert pasted.stdout.count('"state": "ACTIVE"') == 4, "alice and bob, as they join and as they are listed"
        assert '"error": "This voice channel is full."' in pasted.stdout
        assert '"seats_held": 2' in pasted.stdout
        assert '"verdict": "refused"' in pasted.stdout
        assert '"ready": true' in pasted.stdout
        assert '"SCREEN_SHARE"' not in pasted.stdout
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "refused @carol:sandbox.local" in log


def test_ctrl_c_ends_the_sandbox() -> None:
    with running("sandbox") as process:
        assert process.stdout is not None
        assert "sandbox" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
