# SPDX-License-Identifier: Apache-2.0
"""Guards as processes over one Valkey, shortly; ``make stampede`` does it with 4 guards and 2,000 joins, 100 times."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.guardprocess import CHECKOUT


@pytest.mark.parametrize(
    "options", [("--rounds", "2", "--joins", "60"), ("--rounds", "1", "--joins", "30", "--faults")]
)
def test_exactly_as_many_get_in_as_there_are_seats(options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.soak.stampede", "--guards", "2", "--seats", "5", "--at-once", "20"]
    done = subprocess.run([*command, *options], cwd=CHECKOUT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
