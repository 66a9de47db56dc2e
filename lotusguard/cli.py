# SPDX-License-Identifier: Apache-2.0
"""The roof's other door: the ``lotusguard`` command. The service itself is run by ``twistd lotusguard``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import globalLogBeginner
from twisted.python.failure import Failure

from lotusguard import __version__
from lotusguard.config import ConfigurationError, Settings, read_settings
from lotusguard.logs import observer_for
from lotusguard.terminal import StepReport, Terminal

T = TypeVar("T")

FINE, WRONG, MISCONFIGURED, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says. :return: the exit status."""
    parser = _parser()
    asked = parser.parse_args(argv)
    if asked.do is None:
        parser.print_help(sys.stderr)
        return MISCONFIGURED
    status: int = asked.do(asked)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lotusguard",
        description="Enforces Matrix rooms' call policies in front of lk-jwt-service.",
        epilog="The service itself: twistd -n lotusguard. Settings come from the environment, for both.",
    )
    parser.set_defaults(do=None)
    parser.add_argument("--version", action="version", version=f"lotusguard {__version__}")
    commands = parser.add_subparsers(title="commands")

    checking = commands.add_parser(
        "check",
        help="tell whether this configuration would enforce anything",
        description="Asks Synapse, LiveKit and lk-jwt-service, with the service's own settings, whether this "
        "configuration would enforce anything. In doing so it asks lk-jwt-service for a token of a made-up room, "
        "which it deletes again.",
        epilog="Exit status: 0 nothing is wrong, 1 something is, 2 a setting cannot be read.",
    )
    checking.add_argument("--json", action="store_true", help="for machines")
    checking.set_defaults(do=_check)

    sandbox = commands.add_parser(
        "sandbox",
        help="everything at once on loopback, with stand-ins for the dependencies",
        description="Starts stand-ins for Synapse, LiveKit and lk-jwt-service on free ports of loopback, with the "
        "guard in front, prints what to curl, and serves until stopped. No setting of yours is read.",
    )
    sandbox.add_argument("--demo", action="store_true", help="run a call through it and report each step")
    sandbox.add_argument("--verbose", action="store_true", help="with --demo: show the guard's log too")
    sandbox.set_defaults(do=_sandbox)
    return parser


def _check(asked: argparse.Namespace) -> int:
    from lotusguard.check.everything import check

    _log_to("text", "critical")
    try:
        settings = read_settings()
    except ConfigurationError as error:
        print(f"lotusguard: {error}", file=sys.stderr)  # noqa: T201
        if asked.json:
            print(json.dumps({"fine": False, "error": str(error), "findings": []}))  # noqa: T201
        return MISCONFIGURED
    report = _run(lambda reactor: check(settings, reactor))
    if report is None:
        return INTERRUPTED
    if asked.json:
        print(json.dumps(report.as_json(), indent=1, ensure_ascii=False))  # noqa: T201
    else:
        report.tell(Terminal(sys.stdout, os.environ))
    return FINE if report.fine else WRONG


def _sandbox(asked: argparse.Namespace) -> int:
    from lotusguard.sandbox.demo.demo import run_demo
    from lotusguard.sandbox.demo.serve import serve

    _forget_settings()
    if not asked.demo:
        _log_to("text", "info")
        _run(lambda reactor: serve(reactor, sys.stdout))
        return FINE
    _log_to("text", "info" if asked.verbose else "critical")

    async def demo(reactor: Any) -> bool:
        report = StepReport(Terminal(sys.stdout, os.environ), reactor)
        report.title(
            f"A call through lotusguard {__version__}",
            "Stand-ins for Synapse, LiveKit and lk-jwt-service on loopback, with the guard in front of lk-jwt-service.",
            "Each step is checked in what these saw.",
        )
        return await run_demo(reactor, report)

    well = _run(demo)
    if well is None:
        return INTERRUPTED
    return FINE if well else WRONG


def _run(work: Callable[[Any], Awaitable[T]]) -> T | None:
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


def _log_to(format_: str, level: str) -> None:
    """Logs go to standard error: standard output is for what was asked."""
    globalLogBeginner.beginLoggingTo([observer_for(format_, level, sys.stderr)], redirectStandardIO=False)


def _forget_settings() -> None:
    """The sandbox must not touch the dependencies or the state directory of an operator who tries it."""
    ours = {*Settings.model_fields, "guard_config", "state_directory", "notify_socket", "watchdog_usec"}
    for name in [name for name in os.environ if name.lower() in ours or name.startswith("GUARD_")]:
        del os.environ[name]


if __name__ == "__main__":
    sys.exit(main())
