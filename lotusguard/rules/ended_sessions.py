# SPDX-License-Identifier: Apache-2.0
"""Sessions that have ended, so that an event that arrives late does not bring one back."""

from __future__ import annotations

from attrs import define, field

from lotusguard.rules.seats import Session

ENDED_SESSIONS_KEPT = 120.0
"""Seconds for which an ended session is remembered."""


@define
class EndedSessions:
    """The sessions of one Matrix room that ended a short time ago."""

    _ended: dict[Session, float] = field(factory=dict, init=False)

    def __contains__(self, at: Session) -> bool:
        return at in self._ended

    def note(self, at: Session, now: float) -> None:
        self._ended[at] = now

    def shown_by_listing(self, at: Session, since: float) -> None:
        """A listing shows this session. If the listing began after the event, the session has not ended after all."""
        if self._ended.get(at, since) < since:
            del self._ended[at]

    def forget_old(self, now: float) -> None:
        """Drop those to which no delayed event can refer any more."""
        oldest = now - ENDED_SESSIONS_KEPT
        while self._ended:
            at = next(iter(self._ended))
            if self._ended[at] > oldest:
                break
            del self._ended[at]
