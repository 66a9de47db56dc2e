# SPDX-License-Identifier: Apache-2.0
"""How far another machine's clock is from ours, as far as the ``Date`` header of its answers tells."""

from __future__ import annotations

from twisted.web.http import stringToDatetime


def clock_skew(date: bytes, asked_at: float, answered_at: float) -> float | None:
    """Seconds by which the other clock is ahead of ours; 0.0 if the header does not show a difference.

    The header has whole seconds and was written between the request and the answer, so the true difference lies in a
    range; this is the value of that range nearest to 0.

    :param asked_at: our wall clock at the request, ``answered_at`` at the answer, in seconds since the epoch.
    :return: None if the header cannot be read.
    """
    try:
        theirs = float(stringToDatetime(date))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):
        return None
    lowest, highest = theirs - answered_at, theirs + 1 - asked_at
    return 0.0 if lowest <= 0 <= highest else min(lowest, highest, key=abs)
