# SPDX-License-Identifier: Apache-2.0
"""Why a join is refused. Which HTTP answer each reason gets is decided in ``web/answers.py``."""

from __future__ import annotations

from enum import Enum


class Refusal(Enum):
    """The reason of a refusal; the value is what logs and metrics show."""

    FULL = "full"
    NOT_A_MEMBER = "not_a_member"
    HOMESERVER_NOT_ALLOWED = "homeserver_not_allowed"
    JOIN_LEVEL = "join_level"
    """The user's power level is below ``join``."""
    NOT_STARTED = "not_started"
    """The user may not start a call, and nobody who may is in it."""
    REMOVED = "removed"
    """A moderator removed the user from this call less than ten minutes ago."""
    TOO_MANY_SLOTS = "too_many_slots"
    """The room has as many slots as it may have; 429."""
    TOO_MANY_LOOKUPS = "too_many_lookups"
    """The user asks for tokens of too many rooms at once; 429."""
    LOBBY_FULL = "lobby_full"
    """Too many people wait in a lobby; 429."""
    NOT_ADMITTED = "not_admitted"
    """A moderator denied entry from the lobby."""
    NOBODY_ADMITTED = "nobody_admitted"
    """Nobody answered in the lobby in time."""
    SEAT_PENDING = "seat_pending"
    """The join's deadline passed behind a hold that is still pending; 503, which clients retry."""


class JoinRefused(Exception):
    """A join is refused.

    :ivar refusal: why.
    :ivar retry_after: seconds after which asking again may help, for 429 answers; ``None`` for the others.
    """

    def __init__(self, refusal: Refusal, retry_after: float | None = None) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal
        self.retry_after = retry_after
