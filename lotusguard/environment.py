# SPDX-License-Identifier: Apache-2.0
"""Reads a systemd ``EnvironmentFile``, so that the commands see what the service sees."""

from __future__ import annotations

import re
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
