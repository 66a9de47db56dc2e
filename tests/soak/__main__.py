# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.soak --seconds 600``: users, moderators and faults at random, and what must hold nevertheless.

Stand-ins and virtual users live in this process, each guard in a process of its own. In the first half guards are
restarted and killed; with several guards, so is the Valkey that they share. The table at the end says what held; the
exit status says whether everything did.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from twisted.internet import reactor as twisted_reactor
from twisted.internet.defer import Deferred

from lotusguard.process import raise_file_limit
from tests.soak.soak import Soak
from tests.soak.table import Row, show

reactor: Any = twisted_reactor


def main() -> None:
    """Run a soak and print its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--guards", type=int, default=1, help="several share a Valkey")
    parser.add_argument("--seed", type=int, default=None, help="of the random numbers; timing still differs each time")
    parser.add_argument("--keep-logs", type=Path, help="where to keep the guards' logs")
    options = parser.parse_args()
    raise_file_limit()
    rows: list[Row] = []
    failed: list[object] = []

    def done(outcome: Any) -> None:
        if isinstance(outcome, list):
            rows.extend(outcome)
        else:
            failed.append(outcome)
        reactor.stop()

    with TemporaryDirectory(prefix="soak") as directory:
        place = options.keep_logs or Path(directory)
        place.mkdir(exist_ok=True)
        seed = Random().randrange(10**6) if options.seed is None else options.seed
        soak = Soak(reactor, options.seconds, options.users, options.guards, seed, place)
        reactor.callWhenRunning(lambda: Deferred.fromCoroutine(soak.run()).addBoth(done))
        reactor.run()
    if failed:
        sys.exit(str(failed[0]))
    show(rows)
    sys.exit(0 if all(row.held for row in rows) else 1)


if __name__ == "__main__":
    main()
