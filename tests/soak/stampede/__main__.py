# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.soak.stampede``: 2,000 joins on 10 seats through 4 guards, 100 times; with ``--faults``, guards and
Valkey are killed and started again meanwhile. The exit status says whether the limit held.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

from lotusguard.process import raise_file_limit
from tests.soak.stampede.stampede import RECONCILE, Stampede, repeat


def main() -> None:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.stampede", description=__doc__)
    parser.add_argument("--guards", type=int, default=4)
    parser.add_argument("--joins", type=int, default=2000, help="in each round")
    parser.add_argument("--seats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=500, help="callers at the same time")
    parser.add_argument("--faults", action="store_true", help="kill guards and Valkey")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no round after that")
    parser.add_argument("--patient", action="store_true", help="for a busy machine: guards wait for Valkey a minute")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep-logs", type=Path, help="where to keep the guards' logs")
    options = parser.parse_args()
    raise_file_limit()
    with TemporaryDirectory(prefix="stampede") as directory:
        place = options.keep_logs or Path(directory)
        place.mkdir(exist_ok=True)
        stampede = Stampede(
            place,
            options.guards,
            options.joins,
            options.seats,
            options.at_once,
            Random(options.seed),
            _say,
            options.patient,
        )
        sys.exit(0 if asyncio.run(_run(stampede, options)) else 1)


async def _run(stampede: Stampede, options: argparse.Namespace) -> bool:
    faults = options.faults
    # where nothing fails nobody enters either, so the holds have to last for a whole round
    await stampede.start(**({} if faults else {"GUARD_SEAT_TTL": "600"}))
    try:
        work = stampede.round_with_faults if faults else stampede.exact_round
        await repeat(options.rounds, 60 * options.minutes, work)
        return _judge(stampede, faults=faults)
    finally:
        stampede.stop()


def _judge(stampede: Stampede, *, faults: bool) -> bool:
    for name, number in sorted(stampede.counts.items()):
        _say(f"{name:40} {number}")
    if not faults:
        _say(f"{'seconds a round: median, longest':40} {median(stampede.seconds):.1f} {max(stampede.seconds):.1f}")
        return not stampede.counts["wrong"]
    overflows = stampede.overflows(stampede.faults)
    longest = max(overflows, default=0.0)
    _say(f"{'times over the limit':40} {len(overflows)}")
    _say(f"{'longest when all seats were known, s':40} {longest:.1f}")
    _say(f"{'longest when everything ran, s':40} {max(stampede.overflows(stampede.outages), default=0.0):.1f}")
    _say(f"{'removed':40} {stampede.sfu.removed}")
    wrong = ("false refusals after recovery", "rooms over the limit", "let in beside a full call", "gave up")
    return longest <= RECONCILE and not any(stampede.counts[name] for name in wrong)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
