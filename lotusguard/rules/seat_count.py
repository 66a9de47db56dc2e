# SPDX-License-Identifier: Apache-2.0
"""Counting holds by user: several devices of one user take one seat. Every operation costs the same at any size."""

from __future__ import annotations

from attrs import define, field

from lotusguard.rules.seats import Hold

_COUNTED = ("takes_seat", "full", "owns_seat", "removes", "in_call")
"""The columns of the table that are counted."""


@define
class Count:
    """How many holds count as what; in a total, how many users."""

    takes_seat: int = 0
    full: int = 0
    owns_seat: int = 0
    removes: int = 0
    in_call: int = 0


@define
class _User(Count):
    holds: int = 0
    exempt: bool = False


_NOBODY = _User()


@define
class SeatCount:
    """The holds of one Matrix room, counted.

    :ivar total: distinct users, without those who are exempt.
    """

    total: Count = field(factory=Count, init=False)
    _users: dict[str, _User] = field(factory=dict, init=False)

    def add(self, hold: Hold) -> None:
        user = self._users.get(hold.user)
        if user is None:
            user = self._users[hold.user] = _User()
        user.holds += 1
        rules = hold.rules
        for name in _COUNTED:
            if getattr(rules, name):
                before = getattr(user, name)
                setattr(user, name, before + 1)
                if not before and not user.exempt:
                    setattr(self.total, name, getattr(self.total, name) + 1)

    def subtract(self, hold: Hold) -> None:
        """Must be called before the hold's state changes. The user is remembered until `forget`."""
        user = self._users[hold.user]
        user.holds -= 1
        rules = hold.rules
        for name in _COUNTED:
            if getattr(rules, name):
                after = getattr(user, name) - 1
                setattr(user, name, after)
                if not after and not user.exempt:
                    setattr(self.total, name, getattr(self.total, name) - 1)

    def forget(self, user_id: str) -> None:
        """Forget a user without holds."""
        if not self._users.get(user_id, _NOBODY).holds:
            self._users.pop(user_id, None)

    def exempt(self, user_id: str) -> None:
        """This user takes no seat from others, for as long as they have a hold."""
        user = self._users.get(user_id)
        if user is not None and not user.exempt:
            for name in _COUNTED:
                if getattr(user, name):
                    setattr(self.total, name, getattr(self.total, name) - 1)
            user.exempt = True

    def is_exempt(self, user_id: str) -> bool:
        return self._users.get(user_id, _NOBODY).exempt

    def owns_seat(self, user_id: str) -> bool:
        """Whether this user has a seat, or needs none."""
        user = self._users.get(user_id, _NOBODY)
        return user.owns_seat > 0 or user.exempt

    def is_present(self, user_id: str) -> bool:
        return self._users.get(user_id, _NOBODY).in_call > 0
