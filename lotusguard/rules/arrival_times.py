# SPDX-License-Identifier: Apache-2.0
"""How long users who were given a token may take to arrive. Asking again without arriving does not extend it."""

from __future__ import annotations

from attrs import define, field


@define
class _Times:
    """A user's time to arrive, from the first token that they did not use."""

    expires: float
    asked: float


@define
class ArrivalTimes:
    """The time to arrive of each user of one room."""

    _users: dict[str, _Times] = field(factory=dict, init=False)

    def issued(self, user: str, now: float, ttl: float) -> float:
        """A token is issued to a user. :return: when the user must have arrived."""
        times = self._users.get(user)
        if times is None or times.asked + ttl < now:
            times = self._users[user] = _Times(now + ttl, now)
        times.asked = now
        return times.expires

    def arrived(self, user: str) -> None:
        """The user is in the call: a later token gets its own time."""
        self._users.pop(user, None)

    def forget_old(self, now: float, ttl: float) -> None:
        """Drop users who have not asked for the length of ``ttl``."""
        self._users = {user: times for user, times in self._users.items() if times.asked + ttl >= now}
