# SPDX-License-Identifier: Apache-2.0
"""The thread that writes to an SQLite file, and what it does with one batch."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial
from threading import Thread

from twisted.python.threadpool import ThreadPool

Statement = tuple[str, tuple[object, ...]]
"""A statement and its values."""
_INVALID = (
    sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError, UnicodeError,
    OverflowError,
)  # fmt: skip
"""Errors of one write. It is skipped, because it would fail each time and keep back all the others."""


class WritingThread(ThreadPool):
    """Its thread does not keep the process from ending when the start fails, for instance because a port is taken."""

    threadFactory = staticmethod(partial(Thread, daemon=True))  # type: ignore[assignment]


def run_batch(
    connection: sqlite3.Connection,
    statements: Sequence[Statement],
    cleanup: Sequence[Statement],
) -> int:
    """In the writing thread. :return: how many of the statements cannot be run at all."""
    invalid = 0
    cursor = connection.cursor()
    cursor.execute("BEGIN IMMEDIATE")
    try:
        for statement, values in statements:
            try:
                cursor.execute(statement, values)
            except _INVALID:
                invalid += 1
        for statement, values in cleanup:
            cursor.execute(statement, values)
        cursor.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            cursor.execute("ROLLBACK")
        raise
    return invalid
