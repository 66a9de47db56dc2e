# SPDX-License-Identifier: Apache-2.0
"""Instructions per join, as valgrind counts them: the same on a busy machine as on an idle one.

``python -m benchmarks.instructions`` runs the guard, and Twisted alone, under callgrind. What the kernel does is not
counted. Take the order of magnitude of the milliseconds from ``python -m benchmarks``, and small differences from here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import Load
from benchmarks.processes import Callers, Dependencies, GuardProcess, RelayProcess, Subject, raise_file_limit

ROOMS = 2
SETTINGS = {
    "PYTHONHASHSEED": "0", "GUARD_RECONCILE_INTERVAL": "3600", "GUARD_POLICY_TTL": "600",
    "GUARD_LOOKUP_TIMEOUT": "60", "GUARD_UPSTREAM_TIMEOUT": "60",
}  # fmt: skip
"""Nothing is to time out, or to be done every few seconds: everything takes fifty times as long."""


def under_callgrind(command: list[str], directory: Path) -> list[str]:
    return [
        "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={directory}/out", *command,
    ]  # fmt: skip


class CountedGuard(GuardProcess):
    patience = 300.0
    results = Path()

    def command(self, twistd: list[str]) -> list[str]:
        return under_callgrind(super().command(twistd), self.results)


class CountedRelay(RelayProcess):
    patience = 300.0
    results = Path()

    def command(self, twistd: list[str]) -> list[str]:
        return under_callgrind(super().command(twistd), self.results)


def instructions(subject: Subject, callers: Callers, results: Path, joins: int, strangers: int) -> float:
    """Thousands of instructions for each of so many joins."""

    def control(*what: str) -> None:
        subprocess.run(["callgrind_control", *what, str(subject.process.pid)], check=True, capture_output=True)

    before = set(results.iterdir())
    control("-i", "on")
    control("-z")
    outcome = callers.make(Load(subject.port, 16, joins, rooms=ROOMS, strangers=strangers))
    if outcome.statuses != {"200": joins}:
        raise RuntimeError(f"not every caller got a token: {outcome.statuses}")
    control("-d")
    control("-i", "off")
    for dump in sorted(set(results.iterdir()) - before):
        total = re.search(r"^(?:summary|totals): (\d+)", dump.read_text(), re.MULTILINE)
        if total:
            return int(total[1]) / joins / 1000
    raise RuntimeError("valgrind wrote no result")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--joins", type=int, default=200)
    joins = parser.parse_args().joins
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed")
    raise_file_limit()
    kinds: tuple[tuple[str, type[CountedGuard] | type[CountedRelay], dict[str, str]], ...] = (
        ("lotusguard", CountedGuard, SETTINGS),
        ("Twisted alone, following requests", CountedRelay, {"RELAY_LOOKUPS": "0"}),
        ("Twisted alone, first joins", CountedRelay, {"RELAY_LOOKUPS": "2"}),
    )
    with Dependencies() as dependencies, Callers() as callers:
        dependencies.ask({"rooms": ROOMS, "participants": 0, "cap": 1_000_000})
        for name, kind, settings in kinds:
            with TemporaryDirectory(prefix="bench") as directory:
                kind.results = Path(directory)
                with kind(dependencies, settings) as subject:
                    callers.make(Load(subject.port, 16, 100, rooms=ROOMS))
                    callers.make(Load(subject.port, 16, 40, rooms=ROOMS, strangers=1))
                    following = instructions(subject, callers, kind.results, joins, 0)
                    first = instructions(subject, callers, kind.results, joins, 1000)
            sys.stdout.write(f"{name}: following request {following:,.0f} k, first join {first:,.0f} k instructions\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
