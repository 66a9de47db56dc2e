# SPDX-License-Identifier: Apache-2.0
"""The states of a hold on a seat, and one table of what each of them means.

A *hold* is a seat reserved for somebody. `TABLE` says for each state what it counts as and which event moves it where.
`lotusguard.rules.room_seats` reads the table; it also makes the holds, so the first state of each is in the list below.

The life of a seat:

- A token request takes it (PENDING, made by ``RoomSeats.take``). Without a token it is released.
- A token is issued (ISSUED). Its user has ``GUARD_SEAT_TTL`` to arrive, and then is PRESENT.
- *A token was issued and nobody came*: when that time is over the hold is ISSUED_EXPIRED. It still takes a seat,
  because the user may have arrived unnoticed, but nobody is removed for it. The next listing that shows nobody of that
  identity confirms the end, and the seat is free. A join that finds the room full asks for such a listing at once.
  Asking for further tokens does not extend the time (ISSUE_LATE). Where nobody lists, the hold ends after
  ``room_seats.UNCONFIRMED_KEPT``.
- The user hangs up (LEFT, until a listing confirms it), or the session is lost (RECONNECTING for
  ``room_holds.RECONNECT_WINDOW``, then LEFT).
- A participant whose token did not come with a seat is UNSEATED (``RoomSeats.arrive``), and a token that was issued
  while nobody could tell is ISSUED_UNSEATED (``RoomSeats.issue_without_seat``), until a seat turns out to be free.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from attrs import define, frozen


class HoldState(Enum):
    """The state of a hold."""

    PENDING = "pending"
    """The token request is in flight."""
    ISSUED = "issued"
    """A token was issued; its user has not arrived."""
    ISSUED_EXPIRED = "issued_expired"
    """The time to arrive is over. It counts until a listing confirms that nobody came."""
    ISSUED_UNSEATED = "issued_unseated"
    """A token was issued without a seat: we failed open. It is checked when the roster is known, or on arrival."""
    PRESENT = "present"
    """In the call, with a seat."""
    UNSEATED = "unseated"
    """In the call without a seat: an old token, or another issuer."""
    RECONNECTING = "reconnecting"
    """The session ended without the user's doing; the seat is kept for their return."""
    LEFT = "left"
    """The session ended. It counts until a listing confirms that nobody of that identity is there."""


class HoldEvent(Enum):
    """An event that changes the state of a hold."""

    ISSUE = "issue"
    """A token was issued."""
    ISSUE_LATE = "issue_late"
    """A token was issued, but the user's time to arrive, which asking again does not extend, is over."""
    RELEASE = "release"
    """No token was issued, or the caller went away."""
    SEAT = "seat"
    """A seat turned out to be free."""
    ARRIVE = "arrive"
    REPLACE = "replace"
    """The identity was given a newer token, or is in the call already."""
    LEAVE = "leave"
    """The participant hung up, or a moderator removed them."""
    VANISH = "vanish"
    """The session ended in any other way."""
    EXPIRE = "expire"
    CONFIRM = "confirm"
    """A listing that began later shows nobody of that identity."""


@frozen
class StateRules:
    """The meaning of a state.

    :ivar takes_seat: whether the user counts when somebody else looks for a seat.
    :ivar full: whether a room filled by such holds is full. If not, it is only busy: waiting may help.
    :ivar owns_seat: whether the user is let in again, and is never removed for lack of a seat.
    :ivar removes: whether it is certain enough to remove somebody else for it.
    :ivar unconfirmed: whether a listing has to confirm that it is over.
    :ivar in_call: whether the user is in the call.
    :ivar moves: event → the next state; ``None`` ends the hold. Any other event is a programming error.
    """

    takes_seat: bool
    full: bool
    owns_seat: bool
    removes: bool
    unconfirmed: bool
    in_call: bool
    moves: dict[HoldEvent, HoldState | None]


_S, _E = HoldState, HoldEvent
TABLE: dict[HoldState, StateRules] = {
    # state                            takes  full   owns   removes uncon. in_call
    _S.PENDING: StateRules(            True,  False, True,  False, False, False, {
        _E.ISSUE: _S.ISSUED, _E.ISSUE_LATE: _S.ISSUED_EXPIRED, _E.RELEASE: None,
    }),
    _S.ISSUED: StateRules(             True,  True,  True,  True,  False, False, {
        _E.ARRIVE: _S.PRESENT, _E.EXPIRE: _S.ISSUED_EXPIRED, _E.REPLACE: None, _E.LEAVE: _S.LEFT,
    }),
    _S.ISSUED_EXPIRED: StateRules(     True,  True,  True,  False, True,  False, {
        _E.ARRIVE: _S.PRESENT, _E.CONFIRM: None, _E.REPLACE: None, _E.LEAVE: _S.LEFT,
    }),
    _S.ISSUED_UNSEATED: StateRules(    False, False, False, False, False, False, {
        _E.SEAT: _S.ISSUED, _E.ARRIVE: _S.UNSEATED, _E.EXPIRE: None, _E.REPLACE: None, _E.LEAVE: None,
    }),
    _S.PRESENT: StateRules(            True,  True,  True,  True,  False, True, {
        _E.LEAVE: _S.LEFT, _E.VANISH: _S.RECONNECTING,
    }),
    _S.UNSEATED: StateRules(           True,  True,  False, False, False, True, {
        _E.SEAT: _S.PRESENT, _E.LEAVE: None, _E.VANISH: None,
    }),
    _S.RECONNECTING: StateRules(       True,  True,  True,  True,  False, False, {
        _E.ARRIVE: _S.PRESENT, _E.EXPIRE: _S.LEFT, _E.REPLACE: None, _E.LEAVE: _S.LEFT,
    }),
    _S.LEFT: StateRules(               True,  True,  True,  False, True,  False, {
        _E.ARRIVE: _S.PRESENT, _E.CONFIRM: None, _E.REPLACE: None, _E.LEAVE: _S.LEFT,
    }),
}  # fmt: skip


class Session(NamedTuple):
    """One connection to the SFU. ``sid`` is the SFU's name for it and never used again."""

    alias: str
    sid: str


class IdentityKey(NamedTuple):
    """Somebody who was given a token for an SFU room, or was in it."""

    alias: str
    identity: str


@frozen
class Arrival:
    """A participant who takes a seat, as a webhook or a listing shows them.

    :ivar joined: when they joined, at the latest, on our clock; ``None`` where the SFU does not say.
    """

    sid: str
    identity: str
    user: str
    joined: float | None = None


@define(eq=False)
class Hold:
    """A seat reserved for one user.

    :ivar sid: the session, also after it has ended; "" before there was one.
    :ivar began: when it got here: the token's issue, or the arrival, or the departure.
    :ivar expires: when its state ends by itself, for states that `HoldEvent.EXPIRE` moves; when it ended, for those
        that a listing has to confirm.
    :ivar device: the device that the token was asked for; "" if it is not known.
    :ivar stored: whether it was written to the state directory before its token was sent.
    """

    id: str
    user: str
    state: HoldState
    alias: str
    identity: str = ""
    sid: str = ""
    began: float = 0.0
    expires: float = 0.0
    device: str = ""
    stored: bool = False

    @property
    def rules(self) -> StateRules:
        return TABLE[self.state]
