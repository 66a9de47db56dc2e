# SPDX-License-Identifier: Apache-2.0
"""Guards as processes over one Valkey, shortly; ``make stampede`` does it with 4 guards and 2,000 joins, 100 times.

``STAMPEDE_FAULTS=1`` also kills guards and Valkey.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.guardprocess import CHECKOUT


def stampede(*options: str) -> None:
    command = [sys.executable, "-m", "tests.soak.stampede", "--guards", "2", "--seats", "5", "--at-once", "20"]
    done = subprocess.run(
        [*command, "--patient", *options], cwd=CHECKOUT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_exactly_as_many_get_in_as_there_are_seats() -> None:
    stampede("--rounds", "2", "--joins", "60")


@pytest.mark.skipif("STAMPEDE_FAULTS" not in os.environ, reason="takes a minute; STAMPEDE_FAULTS is not set")
def test_the_limit_holds_while_guards_and_valkey_are_killed() -> None:
    stampede("--rounds", "1", "--joins", "30", "--faults")
