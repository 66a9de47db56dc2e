# SPDX-License-Identifier: Apache-2.0
"""The ``lotusguard`` command. The service itself is run by ``twistd lotusguard``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lotusguard import __version__
from lotusguard.commanding import (
    FINE,
    INTERRUPTED,
    MISCONFIGURED,
    WRONG,
    log_to,
    misconfigured,
    reader_gone,
    run_reactor,
)
from lotusguard.config import ConfigurationError, Settings, read_settings
from lotusguard.environment import UnitNotKnown, read_environment_file, read_unit_environment
from lotusguard.history.command import add_commands as add_history_commands
from lotusguard.terminal import StepReport, Terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of the command line. :return: the exit status."""
    parser = command_line()
    asked = parser.parse_args(argv)
    if asked.do is None:
        parser.print_help(sys.stderr)
        return MISCONFIGURED
    try:
        if asked.unit is not None:
            os.environ.update(read_unit_environment(asked.unit))
        if asked.env_file is not None:
            os.environ.update(read_environment_file(asked.env_file))
        status: int = asked.do(asked)
        sys.stdout.flush()
    except BrokenPipeError:
        return reader_gone()
    except OSError as error:
        return misconfigured(f"{error.filename or ''}: {error.strerror}")
    except (ConfigurationError, UnitNotKnown) as error:
        return misconfigured(str(error))
    return status


def command_line() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="lotusguard",
        description="Enforces Matrix rooms' call policies in front of lk-jwt-service.",
        epilog="The service itself: twistd -n lotusguard. Settings come from the environment, for all commands.",
    )
    parser.set_defaults(do=None)
    parser.add_argument("--version", action="version", version=f"lotusguard {__version__}")
    parser.add_argument(
        "--env-file", type=Path, metavar="FILE", help="read settings from this file, as systemd's EnvironmentFile="
    )
    parser.add_argument(
        "--unit", metavar="NAME", help="read all settings that systemd gives to this service, such as lotusguard"
    )
    commands = parser.add_subparsers(title="commands")
    _add_check(commands)
    _add_trial(commands)
    add_history_commands(commands)
    _add_sandbox(commands)
    return parser


def _add_check(commands: Any) -> None:
    checking = commands.add_parser(
        "check",
        help="check whether this configuration would enforce everything",
        description="Asks Synapse, LiveKit and lk-jwt-service with the service's own settings, and reports what this "
        "configuration would not enforce. It requests a token for a made-up room from lk-jwt-service, and deletes "
        "that room afterwards.",
        epilog="Exit status: 0 nothing is wrong, 1 something is, 2 a setting cannot be read.",
    )
    checking.add_argument("--json", action="store_true", help="print the report as JSON")
    checking.set_defaults(do=_check)


def _add_trial(commands: Any) -> None:
    trial = commands.add_parser(
        "trial",
        help="join a call through the running guard, as a client does",
        description="Requests a token from the guard's public listener, as a member of a room does, and checks "
        "that the guard rebuilt it. The room is #lotusguard-trial on the homeserver of MATRIX_TOKEN. It is created by "
        "the first trial and used again by later ones. Nobody enters a call.",
        epilog="Exit status: 0 the token is as it should be, 1 it is not, 2 a setting cannot be read.",
    )
    trial.add_argument("--url", default="", help="the guard's public listener; by default GUARD_BIND_HOST and _PORT")
    trial.add_argument("--room", default="", metavar="ROOM_ID", help="a room that the account is joined to")
    trial.set_defaults(do=_trial)


def _add_sandbox(commands: Any) -> None:
    sandbox = commands.add_parser(
        "sandbox",
        help="run a guard with stand-ins for its dependencies on loopback",
        description="Starts stand-ins for Synapse, LiveKit and lk-jwt-service on free ports of loopback, with the "
        "guard in front of them, prints curl commands to try, and serves until stopped. Your settings are not read.",
    )
    sandbox.add_argument("--demo", action="store_true", help="run through a call and report each step")
    sandbox.add_argument("--verbose", action="store_true", help="with --demo: show the guard's log too")
    sandbox.set_defaults(do=_sandbox)


def _check(asked: argparse.Namespace) -> int:
    from lotusguard.check.everything import check

    log_to("text", "critical")
    try:
        settings = read_settings()
    except ConfigurationError as error:
        if asked.json:
            print(json.dumps({"fine": False, "error": str(error), "findings": []}))  # noqa: T201
        raise
    report = run_reactor(lambda reactor: check(settings, reactor))
    if report is None:
        return INTERRUPTED
    if asked.json:
        print(json.dumps(report.as_json(), indent=1, ensure_ascii=False))  # noqa: T201
    else:
        report.tell(Terminal(sys.stdout, os.environ))
    return FINE if report.fine else WRONG


def _trial(asked: argparse.Namespace) -> int:
    from lotusguard.check.trial import TrialFailed, try_join

    log_to("text", "critical")
    settings = read_settings()
    try:
        done = run_reactor(lambda reactor: try_join(settings, reactor, asked.url, asked.room))
    except TrialFailed as failed:
        print(f"✗ {failed}", file=sys.stderr)  # noqa: T201
        return WRONG
    if done is None:
        return INTERRUPTED
    Terminal(sys.stdout, os.environ).line(f"✓ {done}")
    return FINE


def _sandbox(asked: argparse.Namespace) -> int:
    from lotusguard.sandbox.demo.demo import run_demo
    from lotusguard.sandbox.demo.serve import serve

    _forget_settings()
    if not asked.demo:
        log_to("text", "info")
        run_reactor(lambda reactor: serve(reactor, sys.stdout))
        return FINE
    log_to("text", "info" if asked.verbose else "critical")

    async def demo(reactor: Any) -> bool:
        report = StepReport(Terminal(sys.stdout, os.environ), reactor)
        report.title(
            f"A call through lotusguard {__version__}",
            "Stand-ins for Synapse, LiveKit and lk-jwt-service on loopback, with the guard in front of lk-jwt-service.",
            "Each step is checked against the requests that the stand-ins received.",
        )
        return await run_demo(reactor, report)

    well = run_reactor(demo)
    if well is None:
        return INTERRUPTED
    return FINE if well else WRONG


def _forget_settings() -> None:
    """Remove the operator's settings: the sandbox must not touch their dependencies or state directory."""
    ours = {*Settings.model_fields, "guard_config", "state_directory", "notify_socket", "watchdog_usec"}
    for name in [name for name in os.environ if name.lower() in ours or name.startswith("GUARD_")]:
        del os.environ[name]


if __name__ == "__main__":
    sys.exit(main())
