# SPDX-License-Identifier: Apache-2.0
"""The states of a lobby entry, and one table of what each of them means.

A *lobby entry* belongs to one user of one room, however many requests and devices that user has. `TABLE` says for each
state what it means for a join, how long it lasts, and which event moves it where. An event that a state does not list
changes nothing: of two moderators who decide at the same time, the first one decides. `BEGINS` names the events that
begin an entry where there is none.

The lifetimes of "waiting", "accepted" and "denied" are those of La Suite Meet.
"""

from __future__ import annotations

from enum import Enum

from attrs import define, frozen

from lotusguard.rules.refusals import Refusal


class LobbyState(Enum):
    """What an entry is."""

    WAITING = "waiting"
    """A request of this user is held, or was made in the last seconds."""
    ACCEPTED = "accepted"
    """The user may enter, or is in the call."""
    DENIED = "denied"
    """A moderator said no. Soon the user may ask again."""
    UNANSWERED = "unanswered"
    """Nobody answered in time. Remembered, because clients try another route next and would wait again."""
    REMOVED = "removed"
    """A moderator removed the user from the call. It also holds in rooms without a lobby."""


class LobbyEvent(Enum):
    """What can happen to an entry."""

    ASK = "ask"
    """The user asks for a token."""
    LET_IN = "let_in"
    """The user does not have to wait: by power level, or by having been in the call already."""
    ADMIT = "admit"
    DENY = "deny"
    REMOVE = "remove"
    TIME_OUT = "time_out"
    """The user has waited as long as anybody may."""
    EXPIRE = "expire"
    """The state's lifetime is over."""
    CALL_ENDED = "call_ended"
    LEAVE = "leave"
    """The user is not a member of the room any more."""
    SWITCH_OFF = "switch_off"
    """The room's lobby was switched off."""


@frozen
class StateRules:
    """What a state means.

    :ivar refusal: the answer to a join; ``None`` if it is not refused in this state.
    :ivar lifetime: seconds until the state expires. A waiting entry does not expire while a request is held.
    :ivar moves: event → the next state; ``None`` ends the entry.
    """

    refusal: Refusal | None
    lifetime: float
    moves: dict[LobbyEvent, LobbyState | None]


_S, _E = LobbyState, LobbyEvent
TABLE: dict[LobbyState, StateRules] = {
    _S.WAITING: StateRules(None, 3.0, {
        _E.ASK: _S.WAITING, _E.LET_IN: _S.ACCEPTED, _E.ADMIT: _S.ACCEPTED, _E.DENY: _S.DENIED, _E.REMOVE: _S.REMOVED,
        _E.TIME_OUT: _S.UNANSWERED, _E.EXPIRE: None, _E.LEAVE: None, _E.SWITCH_OFF: None,
    }),
    _S.ACCEPTED: StateRules(None, 6 * 3600.0, {
        _E.LET_IN: _S.ACCEPTED, _E.REMOVE: _S.REMOVED,
        _E.EXPIRE: None, _E.CALL_ENDED: None, _E.LEAVE: None, _E.SWITCH_OFF: None,
    }),
    _S.DENIED: StateRules(Refusal.NOT_ADMITTED, 5.0, {
        _E.LET_IN: _S.ACCEPTED, _E.ADMIT: _S.ACCEPTED, _E.REMOVE: _S.REMOVED,
        _E.EXPIRE: None, _E.LEAVE: None, _E.SWITCH_OFF: None,
    }),
    _S.UNANSWERED: StateRules(Refusal.NOBODY_ADMITTED, 60.0, {
        _E.LET_IN: _S.ACCEPTED, _E.ADMIT: _S.ACCEPTED, _E.DENY: _S.DENIED, _E.REMOVE: _S.REMOVED,
        _E.EXPIRE: None, _E.LEAVE: None, _E.SWITCH_OFF: None,
    }),
    _S.REMOVED: StateRules(Refusal.REMOVED, 600.0, {
        _E.ADMIT: _S.ACCEPTED, _E.REMOVE: _S.REMOVED, _E.EXPIRE: None,
    }),
}  # fmt: skip
BEGINS: dict[LobbyEvent, LobbyState] = {_E.ASK: _S.WAITING, _E.LET_IN: _S.ACCEPTED, _E.REMOVE: _S.REMOVED}
"""Events that begin an entry for a user who has none, and the state it begins with."""
DROPPED_FIRST = (_S.DENIED, _S.UNANSWERED, _S.ACCEPTED, _S.REMOVED)
"""Which entries are dropped where there are too many: short memories first. An accepted user who is forgotten waits
again; a removed one who is forgotten comes back although a moderator said no. Waiting entries are bounded by
themselves and never dropped."""
HELD_LEASE = 30.0
"""Seconds for which an entry stays in the lobby after a guard last held a request for it. If that guard was killed,
Element Call asks again after 2, 4, 8 and 16 s."""


@define(eq=False)
class LobbyEntry:
    """One user's entry in one room's lobby. Times are seconds on the caller's clock.

    :ivar id: its random name, for clients that poll.
    :ivar began: when its state began; for "waiting", when the user asked first.
    :ivar expires: when its state ends by itself.
    :ivar held: how many requests this guard holds for it.
    :ivar notice: the event ID of the notice that asks the room's moderators; "" if there is none.
    :ivar version: grows with each change, where several guards share the entry.
    """

    id: str
    user: str
    state: LobbyState
    began: float
    expires: float
    held: int = 0
    notice: str = ""
    version: int = 0

    @property
    def rules(self) -> StateRules:
        return TABLE[self.state]

    def due(self, now: float, longest_wait: float) -> LobbyEvent | None:
        """What time does to this entry now, if anything."""
        if self.state is LobbyState.WAITING and now - self.began >= longest_wait:
            return LobbyEvent.TIME_OUT
        if now >= self.expires and not self.held:
            return LobbyEvent.EXPIRE
        return None

    def state_at(self, now: float, longest_wait: float) -> LobbyState | None:
        """The state that time gives the entry, whether or not somebody has noted it yet; ``None`` if it has ended."""
        event = self.due(now, longest_wait)
        if event is None:
            return self.state
        after = self.rules.moves[event]
        return after if after is None or now < self.began + longest_wait + TABLE[after].lifetime else None
