# SPDX-License-Identifier: Apache-2.0
"""The guard's image in a container, confined as the compose file does it.

``LOTUSGUARD_IMAGE`` names an image that was built from ``deploy/docker/Dockerfile``, ``CONTAINER_ENGINE`` a program
like Docker's client (``docker``).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import pytest
import yaml

from lotusguard.tap import WRONG_SETTING
from tests.real.services import CHECKOUT

IMAGE = os.environ.get("LOTUSGUARD_IMAGE", "")
ENGINE = os.environ.get("CONTAINER_ENGINE", "docker")
SECRET = "0123456789abcdef0123456789abcdef"
pytestmark = pytest.mark.skipif(not IMAGE, reason="LOTUSGUARD_IMAGE names no image")


def engine(*words: str, status: int = 0) -> str:
    """What a command of the engine prints, on both streams."""
    done = subprocess.run(
        [ENGINE, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def confined(**settings: str) -> list[str]:
    """Arguments of ``run``: the rights of the compose file, no network, and some settings."""
    path = Path(CHECKOUT) / "deploy" / "docker" / "compose.yaml"
    guard = yaml.safe_load(path.read_text(encoding="utf-8"))["services"]["lotusguard"]
    assert guard["read_only"] is True
    words = ["--network=none", "--read-only", *(f"--cap-drop={name}" for name in guard["cap_drop"])]
    words += [f"--security-opt={option}" for option in guard["security_opt"]]
    given = {
        "LIVEKIT_KEY": "lotus",
        "LIVEKIT_SECRET": SECRET,
        "MATRIX_TOKEN": "x",
        "GUARD_LOG_FORMAT": "json",
    } | settings
    return [*words, *(f"--env={name}={value}" for name, value in given.items()), IMAGE]


@pytest.fixture
def container() -> Iterator[str]:
    """The name of a running container whose health check has succeeded once."""
    name = f"lotusguard-test-{token_hex(4)}"
    engine("run", "--detach", "--name", name, *confined())
    try:
        until_healthy(name)
        yield name
    finally:
        engine("rm", "--force", "--volumes", name)


def until_healthy(name: str) -> None:
    """Run the image's health check until it succeeds."""
    (image,) = json.loads(engine("image", "inspect", IMAGE))
    asked, *command = (image["Config"].get("Healthcheck") or image["HealthCheck"])["Test"]
    assert asked == "CMD"
    for _ in range(300):
        if subprocess.run([ENGINE, "exec", name, *command], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError(engine("logs", name))


def test_it_runs_without_root_writes_its_state_only_and_stops_with_status_0(container: str) -> None:
    assert engine("exec", container, "id", "-u").strip() == "10001"
    engine("exec", container, "touch", "/var/lib/lotusguard/can-be-written")
    for path in ("/can-not", "/tmp/can-not", "/opt/lotusguard/can-not"):
        engine("exec", container, "touch", path, status=1)
    engine("stop", container)
    assert engine("inspect", "--format", "{{.State.ExitCode}}", container).strip() == "0"
    lines = [json.loads(line) for line in engine("logs", container).splitlines()]
    assert lines[-1]["message"] == "Server Shut Down."


def test_a_signal_from_inside_reloads_the_settings(container: str) -> None:
    engine("exec", container, "sh", "-c", "kill -HUP 1")
    for _ in range(100):
        if '"reloaded"' in engine("logs", container):
            return
        time.sleep(0.1)
    raise AssertionError(engine("logs", container))


def test_a_wrong_setting_ends_it_with_one_line() -> None:
    told = engine("run", "--rm", *confined(GUARD_BIND_PORT="many"), status=WRONG_SETTING)
    assert told.startswith("lotusguard: GUARD_BIND_PORT: 'many' is not valid")
    assert told.count("\n") == 1
