# SPDX-License-Identifier: Apache-2.0
"""Asking a room's moderators about people in its lobby: one notice each, which they answer by reaction."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

from attrs import define, field
from cachetools import LRUCache
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Deadline, FairSemaphore, run_in_background
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.voice import Reaction, RoomVoice
from lotusguard.rules.lobby import LobbyEntry, LobbyState
from lotusguard.rules.lobby_book import Change

log = Logger()

ADMIT, DENY = "✅", "❌"
_DECISIONS: Mapping[str, bool] = {ADMIT: True, DENY: False}
_EMOJI_STYLE = "\ufe0f"
"""The variation selector that some clients put after an emoji."""
BUSY = frozenset(("rate_limited", "queue_full", "status_429"))
"""Why a notice is not sent for now; people wait on, as long as they may."""
NOTICE_EVERY = 60.0
"""Seconds between two notices about the same person in the same room. A notice about somebody who stopped waiting stays
for as long, in case they ask again."""
SENT_AT_ONCE = 4
NOTICES_REMEMBERED = 20_000
REACTION_TIMEOUT = 5.0
"""Seconds in which a moderator's power level has to be read; then the last known one counts."""

_Key = tuple[str, str]


@define(eq=False)
class _Notice:
    """:ivar event_id: "" while it is being sent."""

    room_id: str
    user: str
    sent: float
    event_id: str = ""


@define(eq=False)
class LobbyNotices:
    """Sends and redacts notices, and passes moderators' reactions on to the lobby.

    :param operators_can_decide: whether people can be admitted without notices too.
    """

    _lobby: Lobby
    _policies: Policies
    _voice: RoomVoice
    _clock: IReactorTime
    _send_timeout: float
    _operators_can_decide: bool
    _notices: dict[_Key, _Notice] = field(factory=dict, init=False)
    _by_event: dict[str, _Notice] = field(factory=dict, init=False)
    _last: LRUCache[_Key, float] = field(factory=lambda: LRUCache(NOTICES_REMEMBERED), init=False)
    _turns: FairSemaphore = field(factory=lambda: FairSemaphore(SENT_AT_ONCE), init=False)

    def start(self) -> None:
        """Take over the notices of an earlier run, and listen."""
        for room_id, entry in self._lobby.noticed():
            notice = _Notice(room_id, entry.user, self._clock.seconds(), entry.notice)
            self._notices[room_id, entry.user] = self._by_event[entry.notice] = notice
        self._lobby.listeners.append(self._changed)
        self._voice.on_reaction(self._reacted)

    def pass_time(self) -> None:
        """Send what may be sent by now, and redact what is out of date: to be called every second."""
        for room_id, entry in self._lobby.without_notice():
            self._want(room_id, entry)
        now = self._clock.seconds()
        for notice in list(self._notices.values()):
            waiting = self._lobby.state_of(notice.room_id, notice.user) is LobbyState.WAITING
            if notice.event_id and not waiting and now - notice.sent >= NOTICE_EVERY:
                self._redact(notice)

    def _changed(self, change: Change) -> None:
        notice = self._notices.get((change.room_id, change.entry.user))
        if change.after is LobbyState.WAITING:
            self._want(change.room_id, change.entry)
        elif change.after is not None and notice is not None and notice.event_id:
            self._redact(notice)

    # -- sending -----------------------------------------------------------------------------------------

    def _want(self, room_id: str, entry: LobbyEntry) -> None:
        """Send a notice about an entry, unless there is one or the last one is too recent."""
        key, now = (room_id, entry.user), self._clock.seconds()
        notice = self._notices.get(key)
        if notice is not None:
            if notice.event_id and entry.notice != notice.event_id:
                self._lobby.set_notice(room_id, entry, notice.event_id)
            return
        last = self._last.get(key)
        if (last is not None and now - last < NOTICE_EVERY) or not self._voice.can_speak(room_id):
            return
        self._last[key] = now
        notice = self._notices[key] = _Notice(room_id, entry.user, now)
        self._in_background(self._send(notice, entry), notice)

    async def _send(self, notice: _Notice, entry: LobbyEntry) -> None:
        try:
            event_id = await self._turns.run(notice.room_id, lambda: self._say(notice))
        except CancelledError:  # it waited too long for its turn: tried again
            self._notices.pop((notice.room_id, notice.user), None)
            self._last.pop((notice.room_id, notice.user), None)
            raise
        except (DependencyFailed, TimeoutError) as failed:
            self._notices.pop((notice.room_id, notice.user), None)
            self._failed(notice, getattr(failed, "reason", "timeout"))
            return
        notice.event_id = event_id
        self._by_event[event_id] = notice
        state = self._lobby.state_of(notice.room_id, notice.user)
        if state is not LobbyState.WAITING:
            if state is not None:
                self._redact(notice)
            return
        self._lobby.set_notice(notice.room_id, entry, event_id)
        for key in _DECISIONS:
            reacting = Deferred.fromCoroutine(self._voice.react(notice.room_id, event_id, key))
            await Deadline.after(self._clock, self._send_timeout).wait(reacting)

    def _say(self, notice: _Notice) -> Deferred[str]:
        """Its time runs from its turn on: a flood must not open the lobby."""
        sending = Deferred.fromCoroutine(self._voice.notice(notice.room_id, self._text(notice)))
        return Deadline.after(self._clock, self._send_timeout).wait(sending)

    def _text(self, notice: _Notice) -> str:
        text = f"{notice.user} asks to join the call: {ADMIT} admit, {DENY} deny"
        lobby = self._policies.last_known(notice.room_id).lobby
        return f"{text}\n{lobby.message}" if lobby is not None and lobby.message else text

    def _failed(self, notice: _Notice, reason: str) -> None:
        log.warn(
            "could not ask {room_id} about {user}: {reason}",
            room_id=notice.room_id, user=notice.user, reason=reason, event_name="lobby_notice_failed",
        )  # fmt: skip
        if reason in BUSY:  # a flood must not open the lobby: tried again
            self._last.pop((notice.room_id, notice.user), None)
        elif not self._operators_can_decide:  # nobody knows that they wait
            self._lobby.decide(notice.room_id, notice.user, admit=True, by="nobody can be asked, so the guard")

    def _redact(self, notice: _Notice) -> None:
        self._notices.pop((notice.room_id, notice.user), None)
        self._by_event.pop(notice.event_id, None)
        self._in_background(self._redacted(notice), notice)

    async def _redacted(self, notice: _Notice) -> None:
        await self._voice.redact(notice.room_id, notice.event_id)
        self._lobby.forget_notice(notice.room_id, notice.user, notice.event_id)

    # -- reactions ---------------------------------------------------------------------------------------

    def _reacted(self, reaction: Reaction) -> None:
        notice = self._by_event.get(reaction.event_id)
        admit = _DECISIONS.get(reaction.key.replace(_EMOJI_STYLE, ""))
        if notice is not None and notice.room_id == reaction.room_id and admit is not None:
            self._in_background(self._decide(notice, reaction.sender, admit=admit), notice)

    async def _decide(self, notice: _Notice, sender: str, *, admit: bool) -> None:
        """Take a reaction as the decision, if its sender may moderate at this moment."""
        deadline = Deadline.after(self._clock, REACTION_TIMEOUT)
        known = await self._policies.get(notice.room_id, deadline, self._clock.seconds())
        if known.policy.may_moderate(sender):
            self._lobby.decide(notice.room_id, notice.user, admit=admit, by=sender)
        else:
            log.info(
                "{sender} may not decide who joins the call of {room_id}",
                sender=sender, room_id=notice.room_id, event_name="lobby_reaction_ignored",
            )  # fmt: skip

    def _in_background(self, work: Coroutine[Any, Any, None], notice: _Notice) -> None:
        bounded = Deadline.after(self._clock, 2 * self._send_timeout + REACTION_TIMEOUT)

        def failed(failure: Failure) -> None:
            if failure.check(DependencyFailed, TimeoutError):
                reason = getattr(failure.value, "reason", "timeout")
                log.info(
                    "a notice or its redaction about {user} in {room_id} failed: {reason}",
                    user=notice.user, room_id=notice.room_id, reason=reason, event_name="lobby_notice_incomplete",
                )  # fmt: skip
            else:
                log.failure("asking {room_id} about {user} failed", failure, room_id=notice.room_id, user=notice.user)

        async def in_time() -> None:
            await bounded.wait(Deferred.fromCoroutine(work))

        run_in_background(in_time(), failed)
