# SPDX-License-Identifier: Apache-2.0
"""A timeout that is the server's fault and not our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.python.failure import Failure

T = TypeVar("T")

BUSY = 0.1
"""Seconds by which the reactor may be late until that counts."""
READ = 0.05
"""Seconds until a call is looked at again, at least."""
LONGEST = 5
"""How many times the timeout a call may take while others are answered, or while this process is not given time."""


def with_timeout(outcome: Deferred[T], seconds: float, reactor: Any, heard: Callable[[], float]) -> Deferred[T]:
    """The same outcome, or `TimeoutError` if the server says nothing for so many seconds.

    Timers run before sockets are read and written. If this process was busy or stopped for a while, the answer may have
    arrived long ago, or the call may not have been sent: the timeout begins anew. And while a crowd waits, the server
    may need longer for all of them; it answers in turn, so a call is waited for as long as others are answered.

    :param heard: when anything was last received from the server.
    """
    began = reactor.seconds()
    due, left, over = began + seconds, LONGEST, False
    timer: Any = None

    def check() -> None:
        nonlocal due, left, over, timer
        now = reactor.seconds()
        silent = now - max(heard(), began)
        if now - due > BUSY and left:
            due, left = now + seconds, left - 1
        elif silent < seconds and now - began < LONGEST * seconds:
            due = min(max(now + READ, heard() + seconds), max(now + READ, began + LONGEST * seconds))
        else:
            over = True
            outcome.cancel()
            return
        timer = reactor.callLater(due - now, check)

    def ended(result: T | Failure) -> T | Failure:
        if timer.active():
            timer.cancel()
        if over and isinstance(result, Failure) and result.check(CancelledError):
            raise TimeoutError(seconds)
        return result

    timer = reactor.callLater(seconds, check)
    return outcome.addBoth(ended)
