# SPDX-License-Identifier: Apache-2.0
"""Reads the service's environment, so that the commands see what the service sees: a file, or all that a unit has."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

_LINE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)=(.*)")


def read_environment_file(path: Path) -> dict[str, str]:
    """The variables of a file of ``NAME=value`` lines.

    Quotes around a value are taken off, and a backslash at the end of a line continues it. Nothing is expanded.

    :raises OSError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8", errors="replace").replace("\\\n", "")
    found = {}
    for line in text.splitlines():
        match = None if line.lstrip().startswith(("#", ";")) else _LINE.fullmatch(line)
        if match is not None:
            value = match[2].strip()
            if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
                value = value[1:-1]
            found[match[1]] = value
    return found


class UnitNotKnown(Exception):
    """The environment of a unit cannot be read. The text says why."""


def _systemctl(words: Sequence[str]) -> str:
    """What ``systemctl`` prints. :raises UnitNotKnown:"""
    try:
        return subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=10, check=True).stdout
    except FileNotFoundError:
        raise UnitNotKnown("--unit needs systemd (systemctl is not installed); use --env-file") from None
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", "") or error).strip()
        raise UnitNotKnown(f"systemctl does not answer ({said}); use --env-file") from None


def read_unit_environment(
    unit: str, ask: Callable[[Sequence[str]], str] = _systemctl, credentials: Path = Path("/run/credentials")
) -> dict[str, str]:
    """The variables that systemd gives to a service: ``Environment=``, then its ``EnvironmentFile=``, then
    ``$CREDENTIALS_DIRECTORY``. The later value of a name wins, as for the service.

    :param ask: runs ``systemctl`` with these arguments.
    :raises UnitNotKnown: systemd does not know such a unit, or is not there.
    :raises OSError: a file cannot be read.
    """
    unit = unit if "." in unit else f"{unit}.service"
    told = ask(["show", "--property=LoadState,Environment,EnvironmentFiles", "--", unit])
    lines = [line.partition("=") for line in told.splitlines()]
    if ("LoadState", "=", "loaded") not in lines:
        raise UnitNotKnown(f"systemd knows no unit {unit}")
    found: dict[str, str] = {}
    for name, _, value in lines:
        if name == "Environment":
            found.update(_assignment(word) for word in shlex.split(value))
        elif name == "EnvironmentFiles":
            path, _, how = value.rpartition(" (ignore_errors=")
            if how != "yes)" or Path(path).exists():
                found.update(read_environment_file(Path(path)))
    if (credentials / unit).is_dir():
        found["CREDENTIALS_DIRECTORY"] = str(credentials / unit)
    return found


def _assignment(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value
