# SPDX-License-Identifier: Apache-2.0
"""The commands ``why`` and ``ejected``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lotusguard.check.asking import Asking, NoAnswer, listener_address
from lotusguard.clients.http import ConnectionPool
from lotusguard.commanding import FINE, INTERRUPTED, WRONG, log_to, misconfigured, run_reactor
from lotusguard.config import read_settings
from lotusguard.guard.joins.decision_store import Question, Record, RecordKind
from lotusguard.history.sources import NotKnown, from_guard, from_journal
from lotusguard.history.telling import tell
from lotusguard.history.times import midnight, read_time
from lotusguard.rules.identity import is_matrix_user
from lotusguard.terminal import Terminal

HISTORY_TIMEOUT = 10.0
"""Seconds for the guard's answer."""
LONGEST_MARGIN = 100_000.0
"""Minutes; decisions are kept for a tenth of that."""


def add_commands(commands: Any) -> None:
    why = commands.add_parser(
        "why",
        help="tell what became of somebody's joins, and why",
        description="Asks the running guard, which keeps its decisions for seven days, or reads its log.",
        epilog="Exit status: 0 there is something to tell, 1 there is not, 2 it cannot be asked.",
    )
    why.add_argument("user", help="a Matrix user ID")
    why.add_argument("--at", metavar="TIME", help="about when: 14:03 (the last one) or 2026-07-04T14:03")
    why.add_argument("--within", type=float, default=10.0, metavar="MINUTES", help="before and after that time (10)")
    why.set_defaults(do=_why)
    ejected = commands.add_parser(
        "ejected",
        help="tell who was removed from calls, and why",
        description="Asks the running guard, which keeps its decisions for seven days, or reads its log.",
        epilog="Exit status: 0 somebody was, 1 nobody was, 2 it cannot be asked.",
    )
    when = ejected.add_mutually_exclusive_group()
    when.add_argument("--today", action="store_true", help="since midnight")
    when.add_argument("--since", metavar="TIME", help="since then: 14:03, 2026-07-04 or 2026-07-04T14:03")
    ejected.set_defaults(do=_ejected, user="")
    for command in (why, ejected):
        command.add_argument("--room", default="", metavar="ROOM_ID", help="in this room only")
        command.add_argument(
            "--journal", metavar="FILE", help="read the guard's JSON log from a file instead, or - for standard input"
        )
        command.add_argument("--json", action="store_true", help="for machines")


def _why(asked: argparse.Namespace) -> int:
    now = datetime.now().astimezone()
    if not is_matrix_user(asked.user):
        return misconfigured(f"{asked.user!r} is not a Matrix user ID; expected one such as @alice:example.org")
    if not 0 <= asked.within <= LONGEST_MARGIN:  # nor is NaN
        return misconfigured(f"--within {asked.within:g} is not usable; expected 0 to {LONGEST_MARGIN:g} minutes")
    if asked.at is None:
        return _history(asked, datetime.fromtimestamp(0).astimezone(), now, None)
    try:
        at, margin = read_time(asked.at, now), timedelta(minutes=asked.within)
        since, until = at - margin, at + margin
    except ValueError as error:
        return misconfigured(str(error))
    except OverflowError:
        return misconfigured(f"--at {asked.at} is out of range")
    return _history(asked, since, until, None)


def _ejected(asked: argparse.Namespace) -> int:
    now = datetime.now().astimezone()
    since = midnight(now) if asked.today else datetime.fromtimestamp(0).astimezone()
    try:
        since = read_time(asked.since, now) if asked.since else since
    except ValueError as error:
        return misconfigured(str(error))
    return _history(asked, since, now, RecordKind.REMOVAL)


def _history(asked: argparse.Namespace, since: datetime, until: datetime, kind: RecordKind | None) -> int:
    question = Question(max(0.0, since.timestamp()), until.timestamp() + 60.0, asked.user, asked.room, kind)
    log_to("text", "critical")
    try:
        if asked.journal == "-":
            found = from_journal(sys.stdin, question)
        elif asked.journal is not None:
            with Path(asked.journal).open(encoding="utf-8", errors="replace") as log:
                found = from_journal(log, question)
        else:
            given = _from_guard(question)
            if given is None:
                return INTERRUPTED
            found = given
    except NotKnown as error:
        return misconfigured(str(error))
    if asked.json:
        print(json.dumps([record.as_json() for record in found], indent=1, ensure_ascii=False))  # noqa: T201
    else:
        tell(found, Terminal(sys.stdout, os.environ), "The guard has decided nothing of the kind in that time.")
    return FINE if found else WRONG


def _from_guard(question: Question) -> list[Record] | None:
    """Ask the guard that runs with these settings. :raises NotKnown:"""
    settings = read_settings()
    if settings.guard_admin_port is None:
        raise NotKnown("GUARD_ADMIN_PORT is empty: the guard has no operators' listener; use --journal")
    base = listener_address(settings.guard_admin_host, settings.guard_admin_port)

    async def ask(reactor: Any) -> list[Record]:
        pool = ConnectionPool(reactor)
        try:
            operators = Asking(reactor, pool, HISTORY_TIMEOUT, time.time).service("GUARD_ADMIN_PORT", base)
            return await from_guard(operators, settings.guard_admin_token.get_secret_value(), question)
        finally:
            await pool.close()

    try:
        return run_reactor(ask)
    except NoAnswer as why:
        raise NotKnown(f"{why}: {why.remedy}; or read the log with --journal") from None
