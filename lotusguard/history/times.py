# SPDX-License-Identifier: Apache-2.0
"""Times as operators write them on the command line, in the time zone of the machine."""

from __future__ import annotations

from datetime import datetime, timedelta

EXPECTED = "14:03, 14:03:11, 2026-07-04 or 2026-07-04T14:03"


def read_time(text: str, now: datetime) -> datetime:
    """A time of day (the latest one that is not in the future), a date (its beginning), or both.

    :raises ValueError: it is none of these.
    """
    text = text.strip()
    for pattern in ("%H:%M", "%H:%M:%S"):
        try:
            clock = datetime.strptime(text, pattern)
        except ValueError:
            continue
        at = now.replace(hour=clock.hour, minute=clock.minute, second=clock.second, microsecond=0)
        return at if at <= now else at - timedelta(days=1)
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a time; expected {EXPECTED}") from None
    return given if given.tzinfo is not None else given.replace(tzinfo=now.tzinfo)


def midnight(now: datetime) -> datetime:
    """When today began."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)
