# SPDX-License-Identifier: Apache-2.0
"""How long users who were given a token may take to arrive. Asking again without arriving does not extend it."""

from __future__ import annotations

from attrs import define, field


@define
class _Chain:
    """A user's time to arrive, from the first token that they did not use."""

    expires: float
    asked: float


@define
class ArrivalTimes:
    """The time to arrive of each user of one room."""

    _chains: dict[str, _Chain] = field(factory=dict, init=False)

    def issued(self, user: str, now: float, ttl: float) -> float:
        """A token is issued to a user. :return: when the user must have arrived."""
        chain = self._chains.get(user)
        if chain is None or chain.asked + ttl < now:
            chain = self._chains[user] = _Chain(now + ttl, now)
        chain.asked = now
        return chain.expires

    def arrived(self, user: str) -> None:
        """The user is in the call: a later token gets its own time."""
        self._chains.pop(user, None)

    def forget_old(self, now: float, ttl: float) -> None:
        """Drop users who have not asked for the length of ``ttl``."""
        self._chains = {user: chain for user, chain in self._chains.items() if chain.asked + ttl >= now}
