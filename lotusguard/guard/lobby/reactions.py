# SPDX-License-Identifier: Apache-2.0
"""Moderators' reactions to notices: each is a decision, if its sender may moderate at this moment."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from attrs import define, field, frozen
from cachetools import LRUCache
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.waiting import Deadline, run_in_background
from lotusguard.guard.lobby.entries import Lobby
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.voice import Reaction
from lotusguard.rules.identity import is_short_name

log = Logger()

ADMIT, DENY = "✅", "❌"
DECISIONS: Mapping[str, bool] = {ADMIT: True, DENY: False}
"""The reactions that decide → whether they admit."""
_EMOJI_STYLE = "\ufe0f"
"""The variation selector that some clients put after an emoji."""
REACTION_TIMEOUT = 5.0
"""Seconds in which a moderator's power level has to be read; then the last known one counts."""
KEPT_FOR = 60.0
"""Seconds for which a reaction to an unknown event is kept: if the answer to a notice is lost, the notice is in the
room, and its event ID becomes known when it is sent again."""
KEPT_IN_ROOM, ROOMS_KEPT = 8, 1_000
"""Reactions that are kept of one room, and rooms. Each has less than a kilobyte."""


@frozen
class _Early:
    """A reaction to an event that may turn out to be a notice. :ivar at: when it was heard."""

    at: float
    event_id: str
    sender: str
    admit: bool


@define(eq=False)
class Reactions:
    """Decides as moderators react to the notices that it knows."""

    _lobby: Lobby
    _policies: Policies
    _clock: IReactorTime
    _asked: dict[str, tuple[str, str]] = field(factory=dict, init=False)
    _early: LRUCache[str, deque[_Early]] = field(factory=lambda: LRUCache(ROOMS_KEPT), init=False)

    def know(self, event_id: str, room_id: str, user: str) -> None:
        """This event asks about this user: reactions to it decide, also those that were heard before."""
        self._asked[event_id] = (room_id, user)
        now = self._clock.seconds()
        early = [one for one in self._early.pop(room_id, ()) if now - one.at < KEPT_FOR]
        others = [one for one in early if one.event_id != event_id]
        if others:
            self._early[room_id] = deque(others, KEPT_IN_ROOM)
        for one in early:
            if one.event_id == event_id:
                self._decide(room_id, user, one.sender, admit=one.admit)

    def forget(self, event_id: str) -> None:
        """Reactions to this event decide nothing any more."""
        self._asked.pop(event_id, None)

    def hear(self, reaction: Reaction) -> None:
        """Somebody reacted to an event."""
        admit = DECISIONS.get(reaction.key.replace(_EMOJI_STYLE, ""))
        if admit is None:
            return
        room_id, user = self._asked.get(reaction.event_id, ("", ""))
        if not room_id:
            self._keep(reaction, admit=admit)
        elif room_id == reaction.room_id:
            self._decide(room_id, user, reaction.sender, admit=admit)

    def _keep(self, reaction: Reaction, *, admit: bool) -> None:
        """Only moderators' reactions, as far as is known: others could crowd them out."""
        is_moderator = self._policies.last_known(reaction.room_id).may_moderate(reaction.sender)
        if is_moderator and is_short_name(reaction.event_id) and is_short_name(reaction.sender):
            kept = self._early.setdefault(reaction.room_id, deque(maxlen=KEPT_IN_ROOM))
            kept.append(_Early(self._clock.seconds(), reaction.event_id, reaction.sender, admit))

    def _decide(self, room_id: str, user: str, sender: str, *, admit: bool) -> None:
        def failed(failure: Failure) -> None:
            log.failure("a reaction of {sender} in {room_id} was lost", failure, sender=sender, room_id=room_id)

        run_in_background(self._decided(room_id, user, sender, admit=admit), failed)

    async def _decided(self, room_id: str, user: str, sender: str, *, admit: bool) -> None:
        deadline = Deadline.after(self._clock, REACTION_TIMEOUT)
        known = await self._policies.get(room_id, deadline, self._clock.seconds())
        if known.policy.may_moderate(sender):
            await self._lobby.decide(room_id, user, admit=admit, by=sender)
        else:
            log.info(
                "{sender} may not decide who joins the call of {room_id}",
                sender=sender, room_id=room_id, event_name="lobby_reaction_ignored",
            )  # fmt: skip
