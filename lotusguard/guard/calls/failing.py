# SPDX-License-Identifier: Apache-2.0
"""Calls in which enforcement fails, and keeps failing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attrs import define, field, frozen
from cachetools import TTLCache
from twisted.internet.interfaces import IReactorTime

KEPT = 10_000
"""SFU rooms whose failures are remembered."""
REPEATED_AFTER = 2.5
"""Seconds between the beginnings of two failed attempts after which they are reported. Each reconciling round tries
again, and so does every arrival, at once: a failure that the next round repairs needs nobody's attention."""


@frozen(eq=False)
class _Failure:
    """:ivar since: when the first failed attempt began. :ivar at: when the last one did."""

    since: float
    at: float
    action: str
    reason: str


@define(eq=False)
class FailingCalls:
    """What could not be done in SFU rooms since everything was last done there.

    :param remembered: seconds after which a failure no longer counts: nobody has tried again, as the call has ended.
    """

    _clock: IReactorTime
    _remembered: float
    _failures: TTLCache[str, _Failure] = field(init=False)
    _attempts: dict[str, float] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._failures = TTLCache(KEPT, self._remembered, timer=self._clock.seconds)

    @contextmanager
    def attempt(self, alias: str) -> Iterator[None]:
        """An attempt to do everything in an SFU room. Unless something fails in it, earlier failures are forgotten."""
        before = self._failures.get(alias)
        self._attempts[alias] = self._clock.seconds()
        try:
            yield
        except Exception:
            self.failed(alias, "enforce", "internal_error")
            raise
        else:
            if self._failures.get(alias) is before:
                self._failures.pop(alias, None)
        finally:
            self._attempts.pop(alias, None)

    def failed(self, alias: str, action: str, reason: str) -> None:
        """Something could not be done. Outside of an attempt somebody was told so: a moderator, or the next attempt."""
        began = self._attempts.get(alias)
        if began is None:
            return
        known = self._failures.get(alias)
        self._failures[alias] = _Failure(known.since if known is not None else began, began, action, reason)

    def report(self) -> str:
        """In how many calls an attempt failed again, and why, in words; "" if in none."""
        known = [self._failures.get(alias) for alias in list(self._failures)]
        again = [one for one in known if one is not None and one.at - one.since >= REPEATED_AFTER]
        if not again:
            return ""
        why = sorted({f"{one.action}: {one.reason}" for one in again})
        calls = "one call" if len(again) == 1 else f"{len(again)} calls"
        return f"enforcement keeps failing in {calls} ({'; '.join(why)})"
