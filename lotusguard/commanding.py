# SPDX-License-Identifier: Apache-2.0
"""What the commands have in common: exit statuses, the reactor, and the log on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import globalLogBeginner
from twisted.python.failure import Failure

from lotusguard.logs import observer_for

T = TypeVar("T")

FINE, WRONG, MISCONFIGURED, INTERRUPTED = 0, 1, 2, 130
READER_GONE = 141
"""What a shell reports for a program that SIGPIPE ended."""


def misconfigured(text: str) -> int:
    print(f"lotusguard: {text}", file=sys.stderr)  # noqa: T201
    return MISCONFIGURED


def reader_gone() -> int:
    """The program that reads standard output has closed it, as ``head`` does when it has enough. That is not an error.

    Python would report that it cannot write at its end what is still buffered.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return READER_GONE


def run_reactor(work: Callable[[Any], Awaitable[T]]) -> T | None:
    """Run the reactor until the work is done.

    :return: what it brought; ``None`` when a signal came first. What it raises is raised here.
    """
    from twisted.internet import reactor

    outcome: list[Any] = []

    async def worked() -> T:
        return await work(reactor)

    def begin() -> None:
        working = Deferred.fromCoroutine(worked())

        def done(result: Any) -> None:
            if not outcome:
                outcome.append(result)
                reactor.stop()

        def interrupted() -> Deferred[Any] | None:
            if outcome:
                return None
            outcome.append(None)
            working.cancel()
            return working

        working.addBoth(done)
        reactor.addSystemEventTrigger("before", "shutdown", interrupted)

    reactor.callWhenRunning(begin)
    reactor.run()
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    result: T = outcome[0]
    return result


def log_to(format_: str, level: str) -> None:
    """Logs go to standard error: standard output is for what was asked."""
    globalLogBeginner.beginLoggingTo([observer_for(format_, level, sys.stderr)], redirectStandardIO=False)
