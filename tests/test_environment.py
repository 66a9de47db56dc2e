# SPDX-License-Identifier: Apache-2.0
"""The commands read the service's environment: all that systemd gives to a unit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lotusguard.environment import UnitNotKnown, read_unit_environment
from tests.test_cli import lotusguard


def test_unit_environment_is_its_variables_then_its_files_then_its_credentials(tmp_path: Path) -> None:
    file = tmp_path / "lotusguard.env"
    file.write_text("LIVEKIT_KEY=from-the-file\n")
    (tmp_path / "lotusguard.service").mkdir()
    asked: list[str] = []

    def systemctl(words: Sequence[str]) -> str:
        asked.extend(words)
        return (
            'Environment=LIVEKIT_KEY=lotus LIVEKIT_SECRET_FROM_FILE=/run/x "GUARD_HOMESERVERS=a b" "Q=it\'s \\"x\\""\n'
            f"EnvironmentFiles={file} (ignore_errors=no)\n"
            "EnvironmentFiles=/nonexistent/file (ignore_errors=yes)\n"
            "LoadState=loaded\n"
        )

    assert read_unit_environment("lotusguard", systemctl, tmp_path) == {
        "LIVEKIT_KEY": "from-the-file",
        "LIVEKIT_SECRET_FROM_FILE": "/run/x",
        "GUARD_HOMESERVERS": "a b",
        "Q": 'it\'s "x"',
        "CREDENTIALS_DIRECTORY": str(tmp_path / "lotusguard.service"),
    }
    assert asked[-1] == "lotusguard.service"


def test_missing_file_that_the_unit_needs_is_an_error(tmp_path: Path) -> None:
    told = f"Environment=\nEnvironmentFiles={tmp_path}/missing (ignore_errors=no)\nLoadState=loaded\n"
    with pytest.raises(FileNotFoundError, match="missing"):
        read_unit_environment("lotusguard@1.service", lambda _: told, tmp_path)


def test_unknown_unit_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnitNotKnown, match=r"systemd knows no unit lotus\.service"):
        read_unit_environment("lotus", lambda _: "Environment=\nLoadState=not-found\n", tmp_path)


def test_machine_without_systemd_is_told_to_name_the_file(tmp_path: Path) -> None:
    done = lotusguard("--unit", "lotusguard", "check", PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "lotusguard: --unit needs systemd (systemctl is not installed); use --env-file\n"
